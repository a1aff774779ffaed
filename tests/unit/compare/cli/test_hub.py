"""What is loaded from the Hub, by the libraries that load it, from a Hub of local folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from peft_dps.compare.data.published import ENTAILED_OR_NOT
from peft_dps.compare.runs.results import read
from tests.hub import local_hub

ROOT = Path(__file__).parents[4]
CARD = """---
configs:
- config_name: {0}
  data_files:
  - split: train
    path: {0}/train*
  - split: {2}
    path: {0}/{2}*
- config_name: {1}
  data_files:
  - split: {2}
    path: {1}/{2}*
---
"""
LOAD_SICK = """
from peft_dps.compare.data.nli import DATA
print(DATA["sick"].load("test", None).labels)
"""


@pytest.fixture
def hub(tmp_path, model_folder, data_files):
    """A Hub with a model, RTE, SICK as the Hub's own conversion has it, and a data set of the user's."""
    root = tmp_path / "hub"
    shutil.copytree(model_folder, root / "models/me/tiny/main")
    reviews = root / "datasets/me/reviews/main"
    for config in ("films", "books"):
        (reviews / config).mkdir(parents=True)
        shutil.copy(data_files / "train.csv", reviews / config / "train.csv")
        shutil.copy(data_files / "elsewhere.csv", reviews / config / "test.csv")
    (reviews / "README.md").write_text(CARD.format("films", "books", "test"))
    glue = root / "datasets/nyu-mll/glue/main"
    for config in ("rte", "wnli"):
        for split in ("train", "validation"):
            _write(glue / config / f"{split}-00000-of-00001.parquet", "sentence1", "sentence2", list(ENTAILED_OR_NOT))
    (glue / "README.md").write_text(CARD.format("rte", "wnli", "validation"))
    sick = root / "datasets/RobZamp/sick/refs/convert/parquet/default/test/0000.parquet"
    _write(sick, "sentence_A", "sentence_B", ["entailment", "neutral", "contradiction"])
    with local_hub(root) as address:
        yield address


def _write(path: Path, first: str, second: str, classes: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"the good film {i}" for i in range(40)]
    features = Features({first: Value("string"), second: Value("string"), "label": ClassLabel(names=classes)})
    labels = [i % len(classes) for i in range(40)]
    Dataset.from_dict({first: texts, second: texts[::-1], "label": labels}, features=features).to_parquet(path)


def python(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with another Hub, whose address the libraries read when they are imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_model_and_data_sets_come_from_the_hub(hub, tmp_path):
    output = tmp_path / "runs.jsonl"
    run = python(
        *(hub, tmp_path, "-m", "peft_dps.compare", "compare", "--model", "me/tiny", "--tasks", "glue/rte"),
        *("--data", "me/reviews", "--data-config", "films", "--text-column", "sentence", "--label-column", "mood"),
        *(
            "--methods",
            "full",
            "--learning-rates",
            "1e-3",
            "--seeds",
            "0",
            "--epochs",
            "1",
            "--no-timing",
            "--no-report",
        ),
        *("--output", str(output)),
    )

    assert run.returncode == 0, run.stdout + run.stderr
    runs = {run.plan.task: run for run in read(output).runs.values()}
    assert set(runs) == {"glue/rte", "reviews"}
    assert {run.plan.model for run in runs.values()} == {"me/tiny"}
    assert runs["glue/rte"].examples == {"train": 40, "validation": 0, "test/rte": 40}
    assert runs["reviews"].examples == {"train": 60, "validation": 0, "test/test": 60}


def test_a_converted_data_set_comes_from_its_revision(hub, tmp_path):
    run = python(hub, tmp_path, "-c", LOAD_SICK)

    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == str(tuple(i % 3 for i in range(40)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "me/none", "--tasks", "glue/rte"), "`model` 'me/none' cannot be loaded"),
        (("--model", "me/tiny", "--data", "me/none", "--text-column", "sentence"), "`source` 'me/none' cannot be"),
        (("--model", "me/tiny", "--tasks", "glue/cola"), "'cola' not found. Available: ['rte', 'wnli']"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, tmp_path, arguments, said):
    run = python(hub, tmp_path, "-m", "peft_dps.compare", "compare", *arguments, "--output", str(tmp_path / "runs"))

    assert run.returncode == 1, run.stdout + run.stderr
    assert said in " ".join((run.stdout + run.stderr).split())
