"""The tables under docs/results/ are those that the result files beside them give.

That includes the hash of the result file, which each page names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_dps.compare.cli.specification import read_specification, to_comparison
from peft_dps.compare.report import report
from peft_dps.compare.report.csv_files import FILES

FOLDER = Path(__file__).parents[4] / "docs" / "results"
COMPARISONS = sorted(path for path in FOLDER.glob("*.toml") if path.with_suffix(".jsonl").exists())


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
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), name
    drawn, kept = ({path.name for path in (folder / "figures").iterdir()} for folder in (tmp_path, committed))
    assert drawn == kept


def test_results_stay_small():
    held = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert held < 500_000 * len(list(FOLDER.glob("*.toml")))
