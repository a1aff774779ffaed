"""The rated corpora and the user's own data: reading, labels, grouped splits, stratified draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from datasets import Value

from peft_dps.compare import corpora as module
from peft_dps.compare.corpora import (
    Corpus,
    DataError,
    Examples,
    binary,
    load_corpora,
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


def test_the_test_part_does_not_depend_on_that_for_validation() -> None:
    parts = split(examples(), validation=0)
    assert parts.test == split(examples()).test
    assert len(parts.validation) == 0
    assert len(parts.train) + len(parts.test) == len(examples())


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.2), (0.1, 0), (0.5, 0.5), (float("nan"), 0.2)])
def test_split_refuses_fractions_out_of_range(validation: float, test: float) -> None:
    with pytest.raises(ValueError, match=r"`validation` must be in \[0, 1\) and `test` in"):
        split(examples(), validation, test)


def test_split_refuses_parts_that_are_empty_or_lack_a_class() -> None:
    with pytest.raises(ValueError, match=r"part lacks any example|part lacks \['yes'\]"):
        split(examples(100, 1, positive=100))
    plain = examples(8, 8)
    with pytest.raises(ValueError, match="part lacks any example"):
        split(Examples("some", plain.texts, tuple(map(float, plain.labels)), plain.groups))


def test_subset_has_the_class_balance_of_the_whole() -> None:
    data = examples()
    for size in (*range(4, 60), 200, 1000):
        drawn = subset(data, size)
        assert len(drawn) == size
        assert abs(sum(drawn.labels) - size / 4) <= 0.5  # rounded to the nearest
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
