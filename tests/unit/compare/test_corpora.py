"""The rated corpora and the user's own data: reading, labels, grouped splits, stratified draws."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, enable_progress_bars

from peft_dps.compare import corpora as module
from peft_dps.compare.corpora import (
    Corpus,
    DataError,
    Examples,
    binary,
    load_corpora,
    load_user_data,
    split,
    subset,
)

ROWS = {
    "movie": b"1\t2.5\tA true delight from start to end.\r\n2\t-0.6\tclich\xc3\xa9s &amp; tepid biopic",
    "amazon": b"1_1\t-0.9\tno picture at all.\r\n1_2\t0.1\t press the button .\r\n12_1\t1.5\tworks fine",
    "nyt": b"3_1\t0\tNothing new.\r\n3_2\t-2\tA disaster, they say.",
    "tweets": b"1\t2.7\tYay. Another good phone interview\r\n2\t-1\t:(\r\n3\t3.1\tYAY! ANOTHER good phone interview",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in ROWS.items():
        (tmp_path / module._FILES[name]).write_bytes(content)
    return tmp_path


def rewrite(folder: Path, name: str, content: bytes) -> None:
    (folder / module._FILES[name]).write_bytes(content)


def test_reads_texts_ratings_and_origins(folder: Path) -> None:
    found = load_corpora(folder)
    assert list(found) == ["movie", "amazon", "nyt", "tweets"]
    assert found["movie"].texts == ("A true delight from start to end.", "clichés & tepid biopic")
    assert found["movie"].ratings == (2.5, -0.6)
    assert found["movie"].groups == ("movie-1", "movie-2")
    assert found["amazon"].texts[1] == "press the button ."
    assert found["amazon"].groups == ("amazon-1", "amazon-1", "amazon-12")
    assert found["nyt"].groups == ("nyt-3", "nyt-3")


def test_rewritten_texts_join_one_group(folder: Path) -> None:
    first, other, rewritten = load_corpora(folder)["tweets"].groups
    assert first == rewritten
    assert first != other


def test_bytes_that_are_not_utf8_are_read_as_windows_1252_and_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder, "movie", b"1\t1\tclich\xe9 \x96 \x93quoted\x94\n2\t1\t\x81 undefined")
    assert load_corpora(folder)["movie"].texts == ("cliché \u2013 \u201cquoted\u201d", "\ufffd undefined")
    assert "line 1 is not UTF-8" in caplog.text
    assert "line 2 is not UTF-8" in caplog.text


@pytest.mark.parametrize(
    "line",
    [b"1\t2.0", b"1\tgood\ttext", b"1\t4.5\ttext", b"1\tnan\ttext", b"\t1\ttext", b"1\t1\t ", b"1\t1\ttext\tmore"],
)
def test_malformed_lines_are_named(line: bytes, folder: Path) -> None:
    rewrite(folder, "nyt", b"1_1\t1\tfine\n" + line)
    with pytest.raises(DataError, match=r"nytEditorialSnippets_GroundTruth\.txt, line 2 must be"):
        load_corpora(folder)


def test_missing_and_empty_files_are_named(folder: Path) -> None:
    rewrite(folder, "tweets", b"\r\n")
    with pytest.raises(DataError, match=r"tweets_GroundTruth\.txt is empty.*fetch_assets"):
        load_corpora(folder)
    (folder / module._FILES["tweets"]).unlink()
    with pytest.raises(DataError, match=r"'tweets' cannot be read.*fetch_assets"):
        load_corpora(folder)


def brute_force(texts: list[str], origins: list[str]) -> set[frozenset[int]]:
    bags = [set(text.split()) for text in texts]
    label = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            alike = len(bags[i] & bags[j]) / len(bags[i] | bags[j]) >= 0.75
            if (alike or origins[i] == origins[j]) and label[i] != label[j]:
                old = label[i]
                label = [label[j] if x == old else x for x in label]
    return {frozenset(i for i, x in enumerate(label) if x == y) for y in set(label)}


def test_linking_agrees_with_comparing_every_pair() -> None:
    words = "abcdefgh"
    texts = []
    for n in range(1, 400):
        chosen = [word for bit, word in enumerate(words) if (n * 2654435761 >> bit) & 1]
        texts.append(" ".join(chosen) or "z")
    texts = texts[:60] + [" ".join(f"{word}{n}" for word in words[: 3 + n % 5]) for n in range(30)]
    texts += [texts[61] + " new", texts[63].rpartition(" ")[0], texts[64].partition(" ")[2] + " x y"]
    origins = [str(i // 2) for i in range(len(texts))]
    groups = module._link(texts, origins)
    found = {frozenset(i for i, group in enumerate(groups) if group == name) for name in set(groups)}
    assert found == brute_force(texts, origins)
    assert len(found) > 10


def corpus(*ratings: float) -> Corpus:
    names = tuple(f"t{i}" for i in range(len(ratings)))
    return Corpus("movie", names, ratings, names)


def test_binary_labels_by_sign_and_leaves_neutral_out() -> None:
    found = binary(corpus(-2.0, -0.5, -0.49, 0.0, 0.49, 0.5, 3.0))
    assert found.texts == ("t0", "t1", "t5", "t6")
    assert found.groups == found.texts
    assert found.labels == (0, 0, 1, 1)
    assert found.label_names == ("negative", "positive")


def test_binary_without_threshold_still_leaves_zero_out() -> None:
    assert binary(corpus(-0.1, 0.0, 0.1), neutral=0).labels == (0, 1)


@pytest.mark.parametrize("neutral", [-0.1, 4.0, float("nan")])
def test_binary_refuses_thresholds_out_of_range(neutral: float) -> None:
    with pytest.raises(ValueError, match=r"`neutral` must be in \[0, 4\), got"):
        binary(corpus(1.0), neutral)


def examples(size: int = 1000, group_size: int = 4, positive: int = 4) -> Examples:
    """One in `positive` examples is positive."""
    texts = tuple(f"text {i}" for i in range(size))
    labels = tuple(int((i * 7919) % positive == 0) for i in range(size))
    return Examples("some", texts, labels, tuple(f"g{i // group_size}" for i in range(size)), ("no", "yes"))


def test_split_keeps_groups_whole_and_loses_nothing() -> None:
    data = examples(group_size=7)
    parts = split(data, validation=0.1, test=0.2)
    held = [set(part.groups) for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, held)) == len(set(data.groups))  # so no two of them overlap
    texts = parts.train.texts + parts.validation.texts + parts.test.texts
    assert Counter(texts) == Counter(data.texts)
    rows = dict(zip(data.texts, zip(data.labels, data.groups, strict=True), strict=True))
    for part in (parts.train, parts.validation, parts.test):
        assert [rows[text] for text in part.texts] == list(zip(part.labels, part.groups, strict=True))
    assert abs(len(parts.test) - 200) <= 7
    assert abs(len(parts.validation) - 100) <= 7


def test_split_depends_on_the_seed_and_on_nothing_else() -> None:
    data = examples()
    assert split(data, seed=3) == split(data, seed=3)
    assert split(data, seed=3) != split(data, seed=4)
    backwards = data.take(range(len(data))[::-1])
    assert set(split(backwards, seed=3).test.texts) == set(split(data, seed=3).test.texts)
    # Pinned: a report made on another machine or Python version must have used the same test set.
    assert split(examples(40, 1), seed=0).test.texts[:4] == ("text 1", "text 16", "text 20", "text 23")


@pytest.mark.parametrize(("validation", "test"), [(0, 0.2), (0.1, 0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.2)])
def test_split_refuses_fractions_out_of_range(validation: float, test: float) -> None:
    with pytest.raises(ValueError, match="`validation` and `test` must be in"):
        split(examples(), validation, test)


def test_split_refuses_parts_that_are_empty_or_lack_a_class() -> None:
    with pytest.raises(ValueError, match=r"part lacks any example|part lacks \['yes'\]"):
        split(examples(100, 1, positive=100))
    plain = examples(8, 8)
    with pytest.raises(ValueError, match="part lacks any example"):
        split(Examples("some", plain.texts, tuple(map(float, plain.labels)), plain.groups))


def test_subset_has_the_class_balance_of_the_whole() -> None:
    for size in (8, 40, 200, 1000):
        drawn = subset(examples(), size)
        assert len(drawn) == size
        assert sum(drawn.labels) == size / 4
        assert len(set(drawn.texts)) == size


def test_smaller_subset_lies_in_larger_one() -> None:
    data = examples(300, positive=3)
    larger: set[str] = set(data.texts)
    for size in range(299, 1, -1):
        smaller = set(subset(data, size, seed=5).texts)
        assert len(smaller) == size
        assert smaller < larger
        larger = smaller


def test_subset_depends_on_the_seed() -> None:
    assert subset(examples(), 50, seed=1) == subset(examples(), 50, seed=1)
    assert set(subset(examples(), 50, seed=1).texts) != set(subset(examples(), 50, seed=2).texts)


def test_rare_class_is_drawn_at_least_once() -> None:
    assert Counter(subset(examples(500, positive=500), 2).labels) == {0: 1, 1: 1}


def test_regression_subset_is_plain() -> None:
    data = Examples("some", ("a", "b", "c"), (0.5, 1.5, 2.5), ("1", "2", "3"))
    assert len(subset(data, 1)) == 1
    assert subset(data, 3) == data


@pytest.mark.parametrize("size", [0, 1, 1001])
def test_subset_refuses_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"`size` must be in \[2, 1000\], got {size}\."):
        subset(examples(), size)


def test_to_dataset_for_classes_pairs_and_regression() -> None:
    data = binary(corpus(-1.0, 2.0)).to_dataset()
    assert data.to_dict() == {"text": ["t0", "t1"], "label": [0, 1]}
    assert data.features["label"].names == ["negative", "positive"]
    paired = Examples("some", ("a",), (0.5,), ("1",), pairs=("b",)).to_dataset()
    assert paired.to_dict() == {"text": ["a"], "label": [0.5], "text_pair": ["b"]}
    assert paired.features["label"] == Value("float32")


TABLE = {
    "review": ["fine", "bad", "fine", "so so"],
    "title": ["a", "b", "c", "d"],
    "mood": ["up", "down", "up", "level"],
    "stars": [5, 1, 5, 3],
    "score": [0.9, -0.5, 0.8, 0.0],
    "liked": [True, False, True, False],
    "author": ["x", "y", "y", "z"],
}


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., dict[str, Examples]]]:
    disable_progress_bars()
    yield lambda *args, **options: load_user_data(*args, cache=tmp_path / "prepared", **options)
    enable_progress_bars()


Load = Callable[..., dict[str, Examples]]


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
@pytest.mark.parametrize("kind", [str, Path])
def test_user_files_of_every_format(suffix: str, kind: type, load: Load, tmp_path: Path) -> None:
    path = write(tmp_path / f"mine{suffix}", TABLE)
    found = load(kind(path), "review", "mood")
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


def test_classes_are_those_of_all_splits(load: Load, tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", {"text": ["x", "y"], "label": ["b", "c"]})
    second = write(tmp_path / "b.csv", {"text": ["z"], "label": ["a"]})
    found = load({"train": [first], "test": str(second)}, "text", "label")
    assert found["train"].labels == (1, 2)
    assert found["test"].labels == (0,)
    assert found["test"].label_names == ("a", "b", "c")
    assert load([first, second], "text", "label")["train"].labels == (1, 2, 0)
    part = load({"train": [first, second]}, "text", "label", splits={"validation": "train[1:]"})
    assert part["validation"].texts == ("y", "z")


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
    path = write(tmp_path / "mine.csv", TABLE)
    with pytest.raises(DataError, match=r"got \['.*absent\.csv'\]: no such file"):
        load({"train": path, "test": tmp_path / "absent.csv"}, "review", "mood")
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path), "review", "mood")
    with pytest.raises(DataError, match="no such file"):
        load([], "review", "mood")
    with pytest.raises(ValueError, match=r"files of one format, of \.csv, .* got mine\.csv, mine\.tsv"):
        load([path, write(tmp_path / "mine.tsv", TABLE)], "review", "mood")
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(ValueError, match=r"files of one format, .* got mine\.txt"):
        load(tmp_path / "mine.txt", "review", "mood")
    with pytest.raises(DataError, match=r"cannot be loaded: .*Check the Hub id with its `config` and `splits`"):
        load(path, "review", "mood", splits={"train": "dev"})


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
        asked.append((where, options["name"], options["revision"], "data_files" in options))
        return DatasetDict(train=part, test=part)

    monkeypatch.setattr(module, "load_dataset", stand_in)
    found = load("some/data", "text", "label", config="english", revision="v1")
    assert asked == [("some/data", "english", "v1", False)]
    assert list(found) == ["train", "test"]
    assert found["train"].name == "some/data"
    assert found["train"].label_names == ("zebra", "ape")  # its own order, not the alphabet's
    assert found["train"].labels == (1, 0)


def test_withheld_test_labels_are_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    monkeypatch.setattr(module, "load_dataset", lambda where, **options: DatasetDict(test=hidden))
    with pytest.raises(DataError, match=r"no label in row 0 of split 'test'.*leave the split out with `splits`"):
        load("some/data", "text", "label")


def test_hub_out_of_reach_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(where: str, **options: Any) -> DatasetDict:
        raise ConnectionError("no route")

    monkeypatch.setattr(module, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'some/data' cannot be loaded: no route.*network"):
        load("some/data", "text", "label")
