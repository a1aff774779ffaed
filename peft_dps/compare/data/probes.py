"""The registry of probes: from a name or a file to what is asked of a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peft_dps.compare.data import glue
from peft_dps.compare.data.assets import fetch_assets
from peft_dps.compare.data.corpora import Corpus, load_corpora
from peft_dps.compare.data.examples import DataError, Examples, draw_order
from peft_dps.compare.data.loading import FORMATS, load_splits, require_columns, strings
from peft_dps.compare.data.probe import Probe
from peft_dps.compare.data.task import Task, at_most
from peft_dps.compare.data.tasks import Place
from peft_dps.compare.settings import Settings

LoadProbe = Callable[[Settings, Place], Probe]
PROBES: dict[str, LoadProbe] = {}

_ARTICLES = 500
_COLUMNS = ("sentence1", "sentence2")
_RATINGS = ("score", "label")


def register_probe(name: str) -> Callable[[LoadProbe], LoadProbe]:
    """Register a function as the probe that the command line calls `name`, in place of one that has it already.

    Returns:
        A decorator that returns its function unchanged. The function takes the settings and the place of the data and
        returns a `Probe`.
    """

    def register(load: LoadProbe) -> LoadProbe:
        PROBES[name] = load
        return load

    return register


def load_probes(
    names: Sequence[str], settings: Settings | None = None, place: Place | None = None
) -> tuple[Probe, ...]:
    """Load probes.

    Args:
        names: Of each, its name in the registry, or the path of a file of rated pairs or of plain text (.txt).
        settings: Longest sequence, and how many pairs are drawn at most; None for the defaults.
        place: Where to find the data; None for the usual places.

    Raises:
        ValueError: There is no such probe, or two have one name.
        DataError: Its data cannot be loaded.
    """
    probes = tuple(_load(name, settings or Settings(), place or Place()) for name in names)
    titles = [probe.name for probe in probes]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"`probes` must have different names, got {', '.join(twice)} twice. Rename a file.")
    return probes


def probed(task: Task, probes: Sequence[Probe]) -> Task:
    """Return a task with probes of which it trains on no text."""
    trained = {text for part in (task.train, task.validation) for text in (*part.texts, *part.pairs)}
    return replace(task, probes=tuple(probe.without(trained) for probe in probes))


def _load(name: str, settings: Settings, place: Place) -> Probe:
    if name in PROBES:
        return PROBES[name](settings, place)
    path = Path(name)
    if path.suffix == ".txt":
        return Probe(path.stem, _passages(path, settings.max_length // 2))
    if path.suffix in FORMATS:
        return Probe(path.stem, at_most(_rated_pairs(path), settings.test_size))
    raise ValueError(
        f"`probes` must be among {', '.join(PROBES)}, or a file of rated pairs ({', '.join(FORMATS)}) or of plain "
        f"text (.txt), got {name!r}."
    )


def _rated_pairs(path: Path) -> Examples:
    data = load_splits(path)["train"]
    rating = next((name for name in _RATINGS if name in data.column_names), _RATINGS[0])
    require_columns({"train": data}, {"probes": (*_COLUMNS, rating)})
    first, second = (strings(data, column, "train") for column in _COLUMNS)
    try:
        ratings = tuple(float(value) for value in data[rating][:])
        if not all(map(math.isfinite, ratings)):
            raise ValueError("one is not finite")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"Column {rating!r} of the probe {str(path)!r} must hold a number in every row: {error}. Remove the other "
            "rows."
        ) from error
    return _examples(path.stem, first, second, ratings)


def _passages(path: Path, words: int) -> Examples:
    """Split a text at blank lines, and what is long into passages of so many words, which fit into a model."""
    try:
        paragraphs = [paragraph.split() for paragraph in path.read_text(encoding="utf-8").split("\n\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The probe {str(path)!r} must be a text file in UTF-8: {error}.") from error
    size = max(1, words)
    passages = [" ".join(part[at : at + size]) for part in paragraphs for at in range(0, len(part), size)]
    return _examples(path.stem, passages)


def _examples(
    name: str, texts: Sequence[str], pairs: Sequence[str] = (), ratings: Sequence[float] | None = None
) -> Examples:
    labels = (0.0,) * len(texts) if ratings is None else tuple(ratings)
    return Examples(name, tuple(texts), labels, tuple(map(str, range(len(texts)))), (), tuple(pairs))


def article_pairs(corpus: Corpus) -> Examples:
    """Pair sentences: rated 1 if both are from one article, else 0.

    Every sentence is in a pair of each kind, so that a model cannot tell them apart by the sentences themselves.

    Args:
        corpus: Sentences with their articles as groups.
    """
    articles: dict[str, list[int]] = defaultdict(list)
    for i in draw_order(0, range(len(corpus.texts))):
        articles[corpus.groups[i]].append(i)
    first, second = zip(*(each[:2] for each in articles.values() if len(each) > 1), strict=True)
    first, second = first[:_ARTICLES], second[:_ARTICLES]
    others = (*second[1:], second[0])
    texts = [corpus.texts[i] for i in (*first, *first)]
    pairs = [corpus.texts[i] for i in (*second, *others)]
    return _examples("articles", texts, pairs, (1.0,) * len(first) + (0.0,) * len(first))


@register_probe("articles")
def _articles(settings: Settings, place: Place) -> Probe:
    corpora = load_corpora(fetch_assets(place.cache).corpora)
    return Probe("articles", article_pairs(corpora["nyt"]))


@register_probe("stsb")
def _stsb(settings: Settings, place: Place) -> Probe:
    return Probe("stsb", at_most(glue.DATA["stsb"].load("validation", place.data_folder), settings.test_size))
