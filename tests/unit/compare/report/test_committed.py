"""The tables under docs/results/ are those that the result files beside them give.

That includes the hash of the result file, which each page names.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from peft_dps.compare.cli.specification import read_specification, to_comparison
from peft_dps.compare.report import report
from peft_dps.compare.report.csv_files import FILES

NUMBER = re.compile(r"(-?\b\d+\.\d+\b)")
ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "docs" / "results"
COMPARISONS = sorted(path for path in FOLDER.glob("*.toml") if path.with_suffix(".jsonl").exists())


def parts(path):
    """Read the texts between numbers, and the numbers."""
    found = NUMBER.split(path.read_text(encoding="utf-8"))
    return found[::2], found[1::2]


def within_a_digit(number):
    """The last one hangs on the versions of numpy and scipy: with the pinned ones it is the same."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if all(f"{name}=={version(name)}" in pins for name in ("numpy", "scipy")):
        return float(number)
    return pytest.approx(float(number), abs=1.01 * 10.0 ** -len(number.partition(".")[2]))


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
        (texts, numbers), (made_texts, made_numbers) = parts(committed / name), parts(tmp_path / name)
        assert made_texts == texts, name
        assert [float(each) for each in made_numbers] == [within_a_digit(each) for each in numbers], name
    drawn, kept = ({path.name for path in (folder / "figures").iterdir()} for folder in (tmp_path, committed))
    assert drawn == kept


def test_results_stay_small():
    held = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert held < 500_000 * len(list(FOLDER.glob("*.toml")))
