"""The rated corpora and the user's own data: reading, labels, grouped splits, stratified draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_dps.compare.data import corpora as module
from peft_dps.compare.data.corpora import Corpus, binary, load_corpora
from peft_dps.compare.data.examples import DataError

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


def test_files_that_cannot_be_read_are_named(folder: Path) -> None:
    rewrite(folder, "tweets", b"\r\n")
    with pytest.raises(DataError, match=r"'tweets' cannot be read.*fetch_assets"):
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
