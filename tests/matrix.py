"""Writes docs/support.md from the marks of the tests: `python -m tests.matrix`.

A test says what it shows with `@pytest.mark.supports(section, feature)`, or `@pytest.mark.refuses(section, feature,
because)`. A feature may name parameters of the test in braces. With `row="name"` the value of that parameter is a row
of a table whose columns are the features.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import versions

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
SECTIONS = ("Models", "Layers", "Targets", "Training", "Adapters", "Saving and loading", "Merging", "Dtypes",
            "Devices", "Base layers", "Quantized base models")  # fmt: skip
HEAD = """# What is supported

<!-- Written by `python -m tests.matrix` from the marks of the tests. Change the marks, not this file. -->

Every "yes" and every "refused" is what a test shows; the tests run with every change. They run on the CPU with small,
randomly initialised models, and show that things work as promised, not how well a model learns. "Refused" means an
error that names the cause, or a warning where it says so; a dash means that there is no such test, for instance
generation with a classifier. Tests are named below `tests/`. What does not name compact storage is about copies of
whole weights (`storage="copy"`, the default).

Layers of GPTQ, AWQ, HQQ, compressed-tensors, AQLM, EETQ and FP8, whose kernels need an accelerator, are stood in for
by modules that have their attributes and a backward pass of their own; those of bitsandbytes and torchao are real.
"""
VERSIONS = """## Versions

`pip` installs any version between the lowest and the newest of these. `make versions` runs all tests on each row.
"""
# Rows by the name of the parameter's value, where that is a name of the tests' own. None: in no table.
LABELS = {
    "mlp": "`torch.nn.Linear`",
    "gpt2": "`Conv1D` of transformers",
    "conv": "`torch.nn.Conv1d`, `Conv2d`, `Conv3d`",
    "text": "`torch.nn.Embedding`, scaled ones too",
    "bert": None,
}


@dataclass(frozen=True)
class Entry:
    """What one test shows."""

    section: str
    row: str | None
    feature: str
    because: str | None
    test: str


class Collector:
    """A plugin of pytest that reads the marks of what was collected."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers():
                if mark.name in ("supports", "refuses"):
                    self._read(item, mark)

    def _read(self, item: pytest.Item, mark: pytest.Mark) -> None:
        callspec = getattr(item, "callspec", None)
        values = {} if callspec is None else callspec.params
        section, feature, *because = mark.args
        row = None
        if "row" in mark.kwargs:
            value = values[mark.kwargs["row"]]
            name = getattr(value, "name", str(value))
            row = LABELS.get(name, name)
            if row is None:
                return
        path = item.path.relative_to(ROOT).as_posix()
        test = f"{path.removeprefix('tests/')}::{getattr(item, 'originalname', item.name)}"
        self.entries.append(Entry(section, row, feature.format(**values), *(because or (None,)), test))


def collect() -> list[Entry]:
    """Collect the tests that carry a mark, without running them."""
    marked = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.(supports|refuses)\(", path.read_text())
    ]
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        status = pytest.main([*options, *marked], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"pytest could not collect the tests ({status!r}):\n{said.getvalue()}")
    return collector.entries


def page(entries: list[Entry]) -> str:
    """Write the page."""
    unknown = {entry.section for entry in entries} - set(SECTIONS)
    if unknown:
        raise SystemExit(f"Marks name the sections {sorted(unknown)}; SECTIONS in tests/matrix.py does not.")
    parts = [HEAD, *_versions()]
    for section in SECTIONS:
        mine = [entry for entry in entries if entry.section == section]
        if mine:
            parts += [f"## {section}\n", *_grid([e for e in mine if e.row]), *_list([e for e in mine if not e.row])]
    return "\n".join(parts).rstrip() + "\n"


def _versions() -> list[str]:
    """A line per row of the versions that the tests have run with, from the newest run of each."""
    if not versions.RESULTS.exists():
        return []
    results = json.loads(versions.RESULTS.read_text())
    lines = [_row(["", "Python", *versions.PACKAGES, "passed", "failed", "skipped"])]
    lines.append(_row(["---"] * (5 + len(versions.PACKAGES))))
    skipped: dict[str, list[str]] = {}
    for row in versions.ROWS:
        result = results.get(row.name)
        if result is None:
            continue
        counts = [result["passed"], len(result["failed"]), sum(result["skipped"].values())]
        packages = [result["packages"][name] for name in versions.PACKAGES]
        lines.append(_row([row.name, result["python"], *packages, *(f"{count:,}" for count in counts)]))
        for reason in result["skipped"]:
            skipped.setdefault(reason, []).append(row.name)
    notes = [f"- skipped, {', '.join(rows)}: {reason}" for reason, rows in sorted(skipped.items())]
    return [VERSIONS, *lines, "", *notes, ""]


def _grid(entries: list[Entry]) -> list[str]:
    """Rows by features, with the reasons and the tests below."""
    if not entries:
        return []
    rows, features = _unique(entry.row for entry in entries), _unique(entry.feature for entry in entries)
    cells = {(entry.row, entry.feature): "yes" if entry.because is None else "refused" for entry in entries}
    lines = [_row(["", *features]), _row(["---"] * (len(features) + 1))]
    lines += [_row([row, *(cells.get((row, feature), "-") for feature in features)]) for row in rows]
    tests: dict[str, list[str]] = {}
    for feature in features:
        tests.setdefault(_tests(entry for entry in entries if entry.feature == feature), []).append(feature)
    reasons = _unique(entry.because for entry in entries)
    notes = [f"- refused: {reason}" for reason in reasons]
    notes += [f"- {'; '.join(shown)}: {names}" for names, shown in tests.items()]
    return [*lines, "", *notes, ""]


def _list(entries: list[Entry]) -> list[str]:
    """One line per feature."""
    if not entries:
        return []
    lines = [_row(["feature", "", "tests"]), _row(["---"] * 3)]
    for feature in _unique(entry.feature for entry in entries):
        mine = [entry for entry in entries if entry.feature == feature]
        reasons = _unique(entry.because for entry in mine)
        lines.append(_row([feature, f"refused: {'; '.join(reasons)}" if reasons else "yes", _tests(mine)]))
    return [*lines, ""]


def _tests(entries: Iterable[Entry]) -> str:
    """Name a test, or the file if there are several in it."""
    tests = _unique(entry.test for entry in entries)
    files = _unique(test.partition("::")[0] for test in tests)
    return ", ".join(f"`{tests[0] if len(tests) == 1 else file}`" for file in files)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _unique(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value is not None))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(collect()))
