"""The tables under docs/results/ are those that the result files beside them give.

That includes the hash of the result file, which each page names.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from peft_dps.compare.cli.specification import read_specification, to_comparison
from peft_dps.compare.report import report
from peft_dps.compare.report.csv_files import FILES

NUMBER = re.compile(r"-?\d+\.\d+(e-?\d+)?")
FOLDER = Path(__file__).parents[4] / "docs" / "results"
COMPARISONS = sorted(path for path in FOLDER.glob("*.toml") if path.with_suffix(".jsonl").exists())


def cells(path):
    """Read the lines of a page, or the cells of a table with numbers as such."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".csv":
        return [[line] for line in lines]
    return [[float(cell) if NUMBER.fullmatch(cell) else cell for cell in row] for row in csv.reader(lines)]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_results_give_their_report(path, tmp_path, monkeypatch):
    comparison = to_comparison(read_specification(path))
    committed = FOLDER / path.stem
    monkeypatch.setattr(report, "save", lambda figure, path: path.touch())  # pictures take long
    report.write_report(FOLDER / comparison.output.name, tmp_path, comparison.reference)
    for name in ("report.md", *FILES):
        assert (tmp_path / name).exists() == (committed / name).exists(), name
        if not (tmp_path / name).exists():
            continue
        # The last digit hangs on the version of scipy.
        expected = [
            [pytest.approx(each, abs=2e-6) if isinstance(each, float) else each for each in row]
            for row in cells(committed / name)
        ]
        assert cells(tmp_path / name) == expected, name
    drawn, kept = ({path.name for path in (folder / "figures").iterdir()} for folder in (tmp_path, committed))
    assert drawn == kept


def test_results_stay_small():
    held = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert held < 500_000 * len(list(FOLDER.glob("*.toml")))
