"""The notebook runs from its first cell to its last, and what it shows came from such a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import transformers
from accelerate.state import AcceleratorState

from peft_dps.compare.data import assets, probes
from tests.local_models import ENCODER, write_models

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
CORPORA = {  # file, and how many sentences it has
    "movieReviewSnippets": 720,
    "amazonReviewSnippets": 12,
    "nytEditorialSnippets": 60,
    "tweets": 12,
}


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def _as_before():
    verbosity = transformers.logging.get_verbosity()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def _rated(row):
    rating, word = (2, "good") if row % 2 else (-2, "dull")
    return f"{rating}\tthe film was {'very ' * (row % 7)}{word}{' and the plot' * (row % 5)}"


@pytest.fixture
def _stand_in(tmp_path, monkeypatch):
    """In place of the assets: a tiny model, and corpora of a few words in the form of the real ones."""
    write_models(tmp_path)
    for name, count in CORPORA.items():
        lines = [f"{row // 2}_{row % 2}\t{_rated(row)}" for row in range(count)]
        (tmp_path / f"{name}_GroundTruth.txt").write_text("\n".join(lines), encoding="utf-8")
    found = assets.Assets(model=tmp_path / ENCODER, corpora=tmp_path)
    for module in (assets, probes):
        monkeypatch.setattr(module, "fetch_assets", lambda cache=None: found)


def run(monkeypatch, folder, capsys):
    monkeypatch.chdir(folder)
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells(), 1):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)  # noqa: S102
    shown = capsys.readouterr().out
    for text in (
        "before: accuracy",
        "after: accuracy",
        "frozen entries unmoved",
        "the same bits: True",
        "without loss",
    ):
        assert text in shown
    return shown


def assert_learned(shown):
    before, after = map(float, re.findall(r"accuracy ([0-9.]+)%", shown))
    assert after > before + 10


@pytest.mark.usefixtures("_as_before", "_stand_in")
def test_the_notebook_runs_on_a_stand_in(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, capsys)


@pytest.mark.network
@pytest.mark.usefixtures("_as_before")
def test_the_notebook_runs_on_the_embedded_model(monkeypatch, tmp_path, capsys):
    shown = run(monkeypatch, tmp_path, capsys)
    assert "adapter 1." in shown
    assert_learned(shown)


def test_its_outputs_are_those_of_one_run():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream"}
    shown = "".join(text for output in outputs for text in output["text"])
    assert "the same bits: True" in shown
    assert "Warning" not in shown
    assert_learned(shown)
