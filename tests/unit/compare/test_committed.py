"""The tables under docs/results/ are those that the result files beside them give."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_dps.compare import report
from peft_dps.compare.flags import read_specification
from peft_dps.compare.specification import to_comparison

FOLDER = Path(__file__).parents[3] / "docs" / "results"
COMPARISONS = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_results_give_their_report(path, tmp_path, monkeypatch):
    comparison = to_comparison(read_specification(path))
    committed = FOLDER / path.stem
    if not committed.is_dir():
        pytest.skip("there is no report of it yet")
    monkeypatch.setattr(report, "save", lambda figure, path: path.touch())  # pictures take long
    report.write_report(FOLDER / comparison.output.name, tmp_path, comparison.reference)
    for name in ("report.md", "scores.csv", "costs.csv", "overall.csv", "runs.csv"):
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), name
