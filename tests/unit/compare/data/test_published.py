"""Published data sets, from local files of the Hub's columns and from a stand-in of the Hub."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peft_dps.compare.data import glue, loading, nli
from peft_dps.compare.data.examples import DataError
from peft_dps.compare.data.glue import glue_task
from peft_dps.compare.data.nli import nli_task
from peft_dps.compare.data.published import Published
from peft_dps.compare.settings import Settings

THREE, TWO = ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "prepared"))


def write(path: Path, columns: dict[str, list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(path)


def rows(columns: tuple[str, ...], labels: list[object], count: int = 24) -> dict[str, list[object]]:
    texts = {column: [f"{column} {i}" for i in range(count)] for column in columns}
    return {**texts, "label": [labels[i % len(labels)] for i in range(count)]}


@pytest.mark.parametrize("name", glue.DATA)
def test_glue_from_local_files(name, tmp_path):
    data = glue.DATA[name]
    labels = list(range(len(data.classes))) or [0.0, 2.5, 5.0]
    splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    for split in ["train", *splits]:
        write(tmp_path / name / f"{split}.parquet", rows(data.columns, labels))
    task = glue_task(name, Settings(), tmp_path)
    assert task.name == f"glue/{name}"
    assert list(task.tests) == (["matched", "mismatched"] if name == "mnli" else [name])
    assert task.train.label_names == data.classes
    assert bool(task.train.pairs) == (len(data.columns) == 2)
    wanted = {"cola": ("matthews",), "stsb": ("pearson", "spearman"), "mrpc": ("accuracy", "f1")}
    assert task.metrics == wanted.get(name, wanted["mrpc"] if name == "qqp" else ("accuracy",))


@pytest.fixture
def nli_folder(tmp_path):
    write(tmp_path / "rte" / "train.parquet", rows(("sentence1", "sentence2"), [0, 1]))
    write(tmp_path / "rte" / "validation.parquet", rows(("sentence1", "sentence2"), [0, 1]))
    for split in ("train", "validation_matched"):
        write(tmp_path / "mnli" / f"{split}.parquet", rows(("premise", "hypothesis"), [0, 1, 2]))
    for split in ("train", "test"):
        write(tmp_path / "snli" / f"{split}.parquet", rows(("premise", "hypothesis"), [0, -1, 1, 2]))
        write(tmp_path / "sick" / f"{split}.parquet", rows(("sentence_A", "sentence_B"), [0, 1, 2]))
        folder = tmp_path / "scitail"
        folder.mkdir(exist_ok=True)
        with (folder / f"{split}.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["premise", "hypothesis", "label"])
            writer.writerows([f"p {i}", f"h {i}", ["entails", "neutral"][i % 2]] for i in range(24))
    return tmp_path


def test_nli_trained_on_two_classes_merges_the_tests_labels(nli_folder):
    task = nli_task("rte", Settings(), nli_folder)
    assert list(task.tests) == ["rte", "mnli", "snli", "sick", "scitail"]
    assert {test.label_names for test in task.tests.values()} == {TWO}
    assert task.merged == {}
    assert task.tests["mnli"].labels[:6] == (0, 1, 1, 0, 1, 1)
    assert task.tests["scitail"].labels[:4] == (0, 1, 0, 1)


def test_nli_trained_on_three_classes_merges_the_predictions(nli_folder):
    task = nli_task("snli", Settings(), nli_folder)
    assert next(iter(task.tests)) == "snli"
    assert task.train.label_names == THREE
    assert task.merged == {"rte": (0, 1, 1), "scitail": (0, 1, 1)}
    assert task.tests["sick"].label_names == THREE
    assert task.tests["snli"].labels[:3] == (0, 1, 2)  # pairs the annotators did not agree on are left out
    assert len(task.tests["snli"]) == 18


def test_every_nli_task_has_every_test(nli_folder):
    assert {len(nli_task(name, Settings(), nli_folder).tests) for name in nli.DATA} == {5}


def test_what_is_missing_or_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no cola/train\.parquet.*sentence, label.*nyu-mll/glue from the Hub"):
        glue.DATA["cola"].load("train", tmp_path)
    write(tmp_path / "cola" / "train.parquet", rows(("text",), [0, 1]))
    with pytest.raises(ValueError, match="`columns` must name columns of the data, got 'sentence'"):
        glue.DATA["cola"].load("train", tmp_path)
    write(tmp_path / "rte" / "train.parquet", rows(("sentence1", "sentence2"), [0, 2]))
    with pytest.raises(DataError, match=r"must hold entailment, not_entailment or .* 0 to 1, got 2 in row 1"):
        glue.DATA["rte"].load("train", tmp_path)
    write(tmp_path / "mrpc" / "train.parquet", rows(("sentence1", "sentence2"), [-1]))
    with pytest.raises(DataError, match="got -1 in row 0"):
        glue.DATA["mrpc"].load("train", tmp_path)


def test_the_hub_is_asked_for_one_split_with_its_configuration(monkeypatch):
    asked = []
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["unacceptable", "acceptable"])})
    part = Dataset.from_dict({"sentence": ["x", "y"], "label": [1, 0]}, features=features)

    def stand_in(where, **options):
        asked.append((where, options["split"], options["name"], options["revision"]))
        return part

    monkeypatch.setattr(loading, "load_dataset", stand_in)
    assert glue.DATA["cola"].load("validation", None).labels == (1, 0)
    assert asked == [("nyu-mll/glue", "validation", "cola", None)]


def test_classes_are_matched_by_name_where_the_hub_orders_them_otherwise(monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["up", "down"])})
    part = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(loading, "load_dataset", lambda where, **options: DatasetDict(train=part)["train"])
    assert Published("mine", "me/mine", ("text",), ("down", "up")).load("train", None).labels == (1, 0)


@pytest.mark.skipif("PEFT_DPS_GLUE" not in os.environ, reason="needs GLUE's files in the folder $PEFT_DPS_GLUE")
@pytest.mark.parametrize(("name", "size"), [("cola", 1043), ("rte", 277), ("mrpc", 408), ("stsb", 1500)])
def test_glue_itself(name, size):
    task = glue_task(name, Settings(), Path(os.environ["PEFT_DPS_GLUE"]))
    assert len(task.tests[name]) == size
    assert len(task.draw(500, 0).train) == 500
