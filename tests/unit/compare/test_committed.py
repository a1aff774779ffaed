"""The tables under docs/results/ are those that the result files beside them give."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from peft_dps.compare import report
from peft_dps.compare.flags import read_specification
from peft_dps.compare.specification import to_comparison

FOLDER = Path(__file__).parents[3] / "docs" / "results"
COMPARISONS = sorted(path for path in FOLDER.glob("*.toml") if path.with_suffix(".jsonl").exists())


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_results_give_their_report(path, tmp_path, monkeypatch):
    comparison = to_comparison(read_specification(path))
    committed = FOLDER / path.stem
    monkeypatch.setattr(report, "save", lambda figure, path: path.touch())  # pictures take long
    report.write_report(FOLDER / comparison.output.name, tmp_path, comparison.reference)
    for name in ("report.md", "scores.csv", "costs.csv", "overall.csv", "runs.csv"):
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), name
    drawn, kept = ({path.name for path in (folder / "figures").iterdir()} for folder in (tmp_path, committed))
    assert drawn == kept
    assert hashlib.sha256((FOLDER / comparison.output.name).read_bytes()).hexdigest()[:16] in (
        committed / "report.html"
    ).read_text(encoding="utf-8")
