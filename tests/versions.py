"""Runs the tests on the versions that pyproject.toml lets in, and writes them into docs/support.md: `make versions`.

`make` makes an environment for each row in .venvs/, so that this needs the standard library alone. `--fast` runs a
part of the tests, in minutes, and writes nothing down.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "data" / "versions.json"
ENVIRONMENTS = ROOT / ".venvs"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")
# What a version is likeliest to break: PEFT, the Trainer and Accelerate, optimizer hooks, files, the recorded runs.
FAST = (
    "tests/contract/test_peft.py",
    "tests/contract/test_saving.py",
    "tests/contract/test_transformers.py",
    "tests/contract/test_training.py",
    "tests/unit/tuner/test_registration.py",
    "tests/unit/tuner/test_model.py",
    "tests/unit/integrations",
    "tests/unit/compare/runs/test_training.py",
    "tests/unit/test_golden.py",
    "tests/unit/test_versions.py",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """Versions to test.

    Attributes:
        name: What the row is called.
        python: The Python.
        constraints: A file of pins in the repository, or the pins themselves; what is not pinned is the newest.
    """

    name: str
    python: str
    constraints: str | tuple[str, ...]


ROWS = (
    Row("lowest", "3.10", "constraints-lowest.txt"),
    Row("pinned", "3.11", "constraints.txt"),
    Row("between", "3.12", ("torch==2.11.0", "transformers==5.17.0", "accelerate==1.15.0", "peft==0.21.2")),
    Row("newest", "3.13", ()),
)


@dataclass
class Result:
    """What a row's tests have shown.

    Attributes:
        python: The Python that they ran with.
        packages: The versions that were installed.
        passed: Number of tests that passed.
        failed: Names of those that did not.
        skipped: Why tests were skipped, and how many for that reason.
    """

    python: str
    packages: dict[str, str]
    passed: int
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def find_python(version: str) -> str:
    """Return an interpreter of that version, or the one that runs this if there is none."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += [str(path) for path in sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)]
    for path in filter(None, candidates):
        # pyenv's shims are there for versions that they do not run.
        asked = subprocess.run([path, "-c", "import ensurepip"], capture_output=True, check=False)
        if asked.returncode == 0:
            return path
    logger.warning("There is no Python %s here: the tests run with %s.", version, sys.executable)
    return sys.executable


def run(row: Row, *, fast: bool) -> Result:
    """Run a row's tests."""
    environment = ENVIRONMENTS / row.name
    ENVIRONMENTS.mkdir(exist_ok=True)
    report = ENVIRONMENTS / f"{row.name}.xml"
    report.unlink(missing_ok=True)
    arguments = [*(FAST if fast else ()), f"--junitxml={report}"]
    settings = {
        "VENV": environment.relative_to(ROOT),
        "PYTHON": find_python(row.python),
        "CONSTRAINTS": _constraints(row),
        "ARGS": " ".join(arguments),
    }
    logger.info("%s: %s", row.name, " ".join(f"{name}={value}" for name, value in settings.items()))
    command = ["make", "test", *(f"{name}={value}" for name, value in settings.items())]
    # Compiling what is never imported takes minutes.
    made = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PIP_NO_COMPILE": "1"})
    if not report.exists():
        raise SystemExit(f"{row.name}: `make test` ended with {made.returncode} before the tests did.")
    return _read(report, environment / "bin" / "python")


def _constraints(row: Row) -> str:
    if isinstance(row.constraints, str):
        return row.constraints
    path = ENVIRONMENTS / f"{row.name}.txt"
    pins = "".join(f"{pin}\n" for pin in row.constraints)
    if not path.exists() or path.read_text() != pins:  # whose date tells `make` to install anew
        path.write_text(pins)
    return str(path.relative_to(ROOT))


def _read(report: Path, python: Path) -> Result:
    ask = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps([platform.python_version(), {{name: version(name) for name in {PACKAGES!r}}}]))"
    )
    told = subprocess.run([python, "-c", ask], capture_output=True, check=True, text=True).stdout
    result = Result(*json.loads(told), passed=0)
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314  # pytest has written it
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            result.passed += 1
        elif outcome.tag == "skipped":
            reason = outcome.get("message", "").removeprefix("Skipped: ")
            result.skipped[reason] = result.skipped.get(reason, 0) + 1
        else:
            result.failed.append(f"{case.get('classname')}::{case.get('name')}")
    return result


def main() -> None:
    """Run the rows that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(names)} to run; all if none is named")
    parser.add_argument("--fast", action="store_true", help="run a part of the tests, and write nothing down")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(names):
        parser.error(f"there is no row {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        result = run(row, fast=arguments.fast)
        failed += [f"{row.name}: {name}" for name in result.failed]
        results[row.name] = asdict(result)
        if not arguments.fast:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            python = ENVIRONMENTS / row.name / "bin" / "python"
            subprocess.run([python, "-m", "tests.matrix"], cwd=ROOT, check=True)
    if failed:
        raise SystemExit("\n".join(["Failed:", *failed]))


if __name__ == "__main__":
    main()
