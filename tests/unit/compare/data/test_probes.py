"""Probes by name and from files."""

from __future__ import annotations

from itertools import chain

import pytest

from peft_dps.compare.data import probes as module
from peft_dps.compare.data.corpora import Corpus
from peft_dps.compare.data.examples import DataError, Examples
from peft_dps.compare.data.probe import LOSS, Probe
from peft_dps.compare.data.probes import article_pairs, load_probes, probed, register_probe
from peft_dps.compare.data.task import build_task
from peft_dps.compare.data.tasks import Place
from peft_dps.compare.settings import Settings


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "prepared"))

    def load(*names, **settings):
        return load_probes(list(map(str, names)), Settings(**settings), Place(data_folder=tmp_path))

    return load


def write(path, rows, header="sentence1,sentence2,score"):
    path.write_text("\n".join([header, *rows]))
    return path


def test_rated_pairs_come_from_a_file(load, tmp_path):
    path = write(tmp_path / "mine.csv", [f"a {i},b {i},{i}" for i in range(20)])
    (probe,) = load(path)
    assert (probe.name, probe.metric) == ("mine", "spearman")
    assert probe.examples.pairs[3] == "b 3"
    assert probe.examples.labels == tuple(map(float, range(20)))
    (fewer,) = load(path, test_size=12)
    assert len(fewer.examples) == 12
    (glue,) = load(write(tmp_path / "other.csv", ["a,b,0.5"] * 3, "sentence1,sentence2,label"))
    assert glue.examples.labels == (0.5,) * 3


def test_text_comes_in_passages(load, tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("One line\nand its second.\n\n\n" + "word " * 10)
    (probe,) = load(path, max_length=8)
    assert (probe.name, probe.metric) == ("plain", LOSS)
    assert probe.examples.texts == (
        "One line and its",
        "second.",
        "word word word word",
        "word word word word",
        "word word",
    )


def test_stsb_comes_from_a_local_folder(load, tmp_path):
    (tmp_path / "stsb").mkdir()
    write(tmp_path / "stsb" / "validation.csv", ["a b,c d,2.5", "e,f,0.0"], "sentence1,sentence2,label")
    (probe,) = load("stsb")
    assert (probe.name, probe.examples.labels) == ("stsb", (2.5, 0.0))


@pytest.mark.parametrize(
    ("name", "rows", "header", "message"),
    [
        ("bad.csv", ["a,b,c"], "sentence1,sentence2,score", "'score' of the probe .* a number in every row"),
        ("bad.csv", ["a,b,"], "sentence1,sentence2,score", "a number in every row"),
        ("bad.csv", ["a,1"], "sentence1,score", "`probes` must name columns of the data, got 'sentence2'"),
    ],
)
def test_unusable_files_are_named(name, rows, header, message, load, tmp_path):
    with pytest.raises((DataError, ValueError), match=message):
        load(write(tmp_path / name, rows, header))


def test_unknown_and_equal_names_are_refused(load, tmp_path):
    with pytest.raises(ValueError, match=r"`probes` must be among articles, stsb, or a file .* got 'nothing'"):
        load("nothing")
    with pytest.raises(DataError, match="must be a text file in UTF-8"):
        load(tmp_path / "absent.txt")
    (tmp_path / "far").mkdir()
    for folder in (tmp_path, tmp_path / "far"):
        (folder / "plain.txt").write_text("text")
    with pytest.raises(ValueError, match="must have different names, got plain twice"):
        load(tmp_path / "plain.txt", tmp_path / "far" / "plain.txt")


def test_articles_pair_every_sentence_with_its_own_and_with_another_article():
    articles = [f"article {i // 3}" for i in range(30)]
    corpus = Corpus("nyt", tuple(f"sentence {i}" for i in range(30)), (0.0,) * 30, tuple(articles))
    pairs = article_pairs(corpus)
    article = dict(zip(corpus.texts, corpus.groups, strict=True))
    for text, other, rating in zip(pairs.texts, pairs.pairs, pairs.labels, strict=True):
        assert text != other
        assert (article[text] == article[other]) == (rating == 1)
    for rating in (0, 1):
        used = [pair for *pair, label in zip(pairs.texts, pairs.pairs, pairs.labels, strict=True) if label == rating]
        assert len(set(chain(*used))) == 2 * len(used) == 20


def test_a_task_never_trains_on_what_its_probes_ask(examples):
    settings = Settings(validation_size=8)
    task = build_task("mine", examples(), {"here": examples(18)}, settings)
    new = tuple(f"new {i}" for i in range(10))
    texts = (*task.train.texts[:2], *new, *task.validation.texts[:2])
    (probe,) = probed(task, [Probe("plain", Examples("plain", texts, (0.0,) * 14, texts))]).probes
    assert probe.examples.texts == new


def test_a_probe_of_ones_own(load, monkeypatch, examples):
    monkeypatch.setattr(module, "PROBES", {})
    register_probe("own")(lambda settings, place: Probe("own", examples()))
    assert load("own") == (Probe("own", examples()),)
