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

Every line is what a test shows, with every change: on the CPU, with small models of random weights. "Refused" is
an error that names the cause, or a warning where it says so; a dash means that there is no such test. Those of
torchao and DeepSpeed run where these are installed. Each section names its files below `tests/`; a line's words
are in the mark of its test. What does not name compact storage is about copies of whole weights (`storage="copy"`,
the default).

Layers of bitsandbytes and torchao are real. Those of GPTQ, AWQ, HQQ, compressed-tensors, AQLM, EETQ and FP8, whose
kernels need an accelerator, are modules with their attributes and a backward pass of their own.
"""
VERSIONS = """## Versions

`pip` installs any version between the lowest and the newest of these. `make versions` runs all tests on each row;
a test that failed and was mended has run again by itself.
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
        self.entries = entries_of(session.items)


def entries_of(items: Iterable[pytest.Item]) -> list[Entry]:
    """Read the marks of tests, file by file."""
    found = [
        _entry(item, mark)
        for item in sorted(items, key=lambda item: item.path)
        for mark in item.iter_markers()
        if mark.name in ("supports", "refuses")
    ]
    return [entry for entry in found if entry is not None]


def _entry(item: pytest.Item, mark: pytest.Mark) -> Entry | None:
    callspec = getattr(item, "callspec", None)
    values = {} if callspec is None else callspec.params
    section, feature, *because = mark.args
    row = None
    if "row" in mark.kwargs:
        value = values[mark.kwargs["row"]]
        name = getattr(value, "name", str(value))
        row = LABELS.get(name, name)
        if row is None:
            return None
    path = item.path.relative_to(ROOT).as_posix()
    test = f"{path.removeprefix('tests/')}::{getattr(item, 'originalname', item.name)}"
    return Entry(section, row, feature.format(**values), *(because or (None,)), test)


def marked_files() -> list[Path]:
    """Return the files with tests that carry a mark."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if re.search(r"mark\.(supports|refuses)\(", path.read_text())]


def collect() -> list[Entry]:
    """Collect the tests that carry a mark, without running them."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        status = pytest.main([*options, *map(str, marked_files())], plugins=[collector])
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
            files = ", ".join(_unique(f"`{entry.test.partition('::')[0]}`" for entry in mine))
            grid, listed = _grid([e for e in mine if e.row]), _list([e for e in mine if not e.row])
            parts += [f"## {section}\n", *grid, *listed, f"Tests: {files}\n"]
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
    """Rows by features, with the reasons below; rows with the same cells are one."""
    if not entries:
        return []
    rows, features = _unique(entry.row for entry in entries), _unique(entry.feature for entry in entries)
    cells = {(entry.row, entry.feature): "yes" if entry.because is None else "refused" for entry in entries}
    lines = [_row(["", *features]), _row(["---"] * (len(features) + 1))]
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        alike.setdefault(tuple(cells.get((row, feature), "-") for feature in features), []).append(row)
    lines += [_row(["; ".join(names), *values]) for values, names in alike.items()]
    reasons = [f"- refused: {reason}" for reason in _unique(entry.because for entry in entries)]
    return [*lines, "", *reasons, *([""] if reasons else [])]


def _list(entries: list[Entry]) -> list[str]:
    """A line for each feature that works, and a table of those that are refused."""
    works, refused = [], [_row(["refused", "why"]), _row(["---"] * 2)]
    for feature in _unique(entry.feature for entry in entries):
        reasons = _unique(entry.because for entry in entries if entry.feature == feature)
        if reasons:
            refused.append(_row([feature, "; ".join(reasons)]))
        else:
            works.append(f"- {feature}")
    return [line for lines in (works, refused if len(refused) > 2 else []) if lines for line in (*lines, "")]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _unique(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value is not None))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(collect()))
