from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peft_dps.compare.data import loading as module
from peft_dps.compare.data.examples import DataError, Examples
from peft_dps.compare.data.loading import load_examples

TABLE = {
    "review": ["fine", "bad", "fine", "so so"],
    "title": ["a", "b", "c", "d"],
    "mood": ["up", "down", "up", "level"],
    "stars": [5, 1, 5, 3],
    "score": [0.9, -0.5, 0.8, 0.0],
    "liked": [True, False, True, False],
    "author": ["x", "y", "y", "z"],
}


Load = Callable[..., dict[str, Examples]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    return lambda source, *args, **options: load_examples(str(source), *args, **options)


def write(path: Path, table: dict[str, list[Any]]) -> Path:
    data = Dataset.from_dict(table)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        data.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_user_files_of_every_format(suffix: str, load: Load, tmp_path: Path) -> None:
    path = write(tmp_path / f"mine{suffix}", TABLE)
    found = load(path, "review", "mood")
    assert list(found) == ["train"]
    assert found["train"].texts == tuple(TABLE["review"])
    assert found["train"].label_names == ("down", "level", "up")
    assert found["train"].labels == (2, 0, 2, 1)
    assert found["train"].groups == ("0", "1", "0", "3")  # equal texts stay together
    assert found["train"].pairs == ()


@pytest.mark.parametrize(
    ("column", "labels", "names"),
    [
        ("stars", (2, 0, 2, 1), ("1", "3", "5")),
        ("liked", (1, 0, 1, 0), ("False", "True")),
        ("score", (0.9, -0.5, 0.8, 0.0), ()),
    ],
)
def test_user_labels_of_every_kind(
    column: str, labels: tuple[float, ...], names: tuple[str, ...], load: Load, tmp_path: Path
) -> None:
    found = load(write(tmp_path / "mine.jsonl", TABLE), "review", column)["train"]
    assert found.labels == labels
    assert [type(label) for label in found.labels] == [int if names else float] * 4
    assert found.label_names == names


def test_user_pairs_and_groups(load: Load, tmp_path: Path) -> None:
    found = load(write(tmp_path / "mine.csv", TABLE), ["review", "title"], "mood", group_column="author")["train"]
    assert found.pairs == ("a", "b", "c", "d")
    assert found.groups == ("0", "1", "1", "3")
    without = load(tmp_path / "mine.csv", ["review", "title"], "mood")["train"]
    assert len(set(without.groups)) == 4


def test_classes_are_those_of_all_splits(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": {"text": ["x", "y"], "label": ["b", "c"]}, "test": {"text": ["z"], "label": ["a"]}}
    data = DatasetDict({name: Dataset.from_dict(table) for name, table in parts.items()})
    monkeypatch.setattr(module, "load_dataset", lambda where, **options: data)
    found = load("some/data", "text", "label")
    assert found["train"].labels == (1, 2)
    assert found["test"].labels == (0,)
    assert found["test"].label_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_columns": "body"},
            r"`text_columns` must name columns of the data, got 'body'; .*'train' are 'review'",
        ),
        ({"label_column": "class"}, r"`label_column` .* got 'class'; .*'mood', 'stars'"),
        ({"group_column": "user"}, r"`group_column` .* got 'user'; "),
        ({"text_columns": []}, r"`text_columns` must name 1 or 2 columns, got \[\]"),
        ({"text_columns": ["review", "title", "mood"]}, "must name 1 or 2 columns"),
    ],
)
def test_wrong_columns_are_named(options: dict[str, Any], message: str, load: Load, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", TABLE)
    with pytest.raises(ValueError, match=message):
        load(path, **{"text_columns": "review", "label_column": "mood"} | options)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("mood", ["up", None, "down", None], r"'mood' has no label in row 1 of split 'train' \(2 such rows\)"),
        ("mood", [1.0, float("nan"), 2.0, 1.0], "has no label in row 1"),
        ("mood", [1.0, 2.0, float("inf"), 1.0], "has no label in row 2"),
        ("mood", ["up"] * 4, r"at least 2 classes, got only \['up'\]"),
        ("mood", [[1], [2], [1], [3]], "must hold strings, ints, bools or floats"),
        ("review", ["a", "b", None, "c"], r"'review' must hold texts, got None in row 2 of split 'train' \(1 such"),
        ("review", [1, 2, 3, 4], "'review' must hold texts, got 1 in row 0"),
    ],
)
def test_unusable_values_are_named(column: str, values: list[Any], message: str, load: Load, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", TABLE | {column: values})
    with pytest.raises(DataError, match=message):
        load(path, "review", "mood")


def test_unusable_sources_are_named(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got '.*absent\.csv': no such file"):
        load(tmp_path / "absent.csv", "review", "mood")
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path), "review", "mood")
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a file of \.csv, .* got mine\.txt"):
        load(tmp_path / "mine.txt", "review", "mood")
    (tmp_path / "mine.parquet").write_text("text")
    with pytest.raises(DataError, match=r"cannot be loaded: .*Check the Hub id with its `config`"):
        load(tmp_path / "mine.parquet", "review", "mood")


def test_empty_split_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = DatasetDict(train=Dataset.from_dict(TABLE), test=Dataset.from_dict({"review": [], "mood": []}))
    monkeypatch.setattr(module, "load_dataset", lambda where, **options: parts)
    with pytest.raises(DataError, match=r"must have rows in every split, got \{'train': 4, 'test': 0\}"):
        load("some/data", "review", "mood")


def test_hub_ids_go_to_the_hub(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ape"])})
    part = Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)

    def stand_in(where: str, **options: Any) -> DatasetDict:
        asked.append((where, options["name"], "data_files" in options))
        return DatasetDict(train=part, test=part)

    monkeypatch.setattr(module, "load_dataset", stand_in)
    found = load("some/data", "text", "label", config="english")
    assert asked == [("some/data", "english", False)]
    assert list(found) == ["train", "test"]
    assert found["train"].name == "some/data"
    assert found["train"].label_names == ("zebra", "ape")  # its own order, not the alphabet's
    assert found["train"].labels == (1, 0)


def test_withheld_test_labels_are_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    monkeypatch.setattr(module, "load_dataset", lambda where, **options: DatasetDict(test=hidden))
    with pytest.raises(DataError, match=r"no label in row 0 of split 'test' \(1 such rows\). Remove these rows"):
        load("some/data", "text", "label")


def test_splits_without_any_label_are_left_out(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    known = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    parts = DatasetDict(train=known, validation=known, test=hidden, unsupervised=hidden)
    monkeypatch.setattr(module, "load_dataset", lambda where, **options: parts)
    assert list(load("some/data", "text", "label")) == ["train", "validation"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_words_that_look_like_nothing_are_words(suffix: str, load: Load, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    rows = [["text", "side"], ["null", "favor"], ["NA", "against"], ["a", "None"]]
    path.write_text("\n".join(("," if suffix == ".csv" else "\t").join(row) for row in rows))
    found = load(path, "text", "side")["train"]
    assert found.texts == ("null", "NA", "a")
    assert found.label_names == ("None", "against", "favor")


@pytest.mark.parametrize("word", ["NA", "nan", "None", ""])
def test_what_stands_among_numbers_for_none_is_named(word: str, load: Load, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"text,score\na,0.5\nb,{word}\nc,1.5")
    with pytest.raises(DataError, match=r"'score' has no label in row 1 of split 'train' \(1 such rows\)"):
        load(path, "text", "score")


def test_a_tsv_file_without_quoting_loses_no_rows(load: Load, tmp_path: Path) -> None:
    texts = ['"I said', "so", 'he said "no"', '"', "the end"]
    path = tmp_path / "plain.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{index % 2}\n" for index, text in enumerate(texts)))
    assert load(path, "text", "label")["train"].texts == tuple(texts)


def test_a_tsv_file_with_quoting_is_read_as_such(load: Load, tmp_path: Path) -> None:
    texts = ['"I said', "two\nlines", "a\ttab", 'he said "no"']
    path = write(tmp_path / "quoted.tsv", {"text": texts, "label": [0, 1, 0, 1]})
    assert load(path, "text", "label")["train"].texts == tuple(texts)


def test_a_path_with_brackets_is_a_path(load: Load, tmp_path: Path) -> None:
    path = write(tmp_path / "mine [1].csv", TABLE)
    assert load(path, "review", "mood")["train"].texts == tuple(TABLE["review"])


def test_hub_out_of_reach_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(where: str, **options: Any) -> DatasetDict:
        raise ConnectionError("no route")

    monkeypatch.setattr(module, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'some/data' cannot be loaded: no route.*network"):
        load("some/data", "text", "label")
