"""Read the demo's four rated corpora or the user's own data, label them, split them, draw from them."""

from __future__ import annotations

import hashlib
import html
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.features import ClassLabel, Features, Value

_logger = logging.getLogger(__name__)
_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
_ALIKE = 0.75  # a binary fraction, so that the arithmetic of `_link` is exact


class DataError(RuntimeError):
    """A data set cannot be read or is not what it should be; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Corpus:
    """Sentences with human sentiment ratings.

    Args:
        name: "movie", "amazon", "nyt" or "tweets".
        texts: The sentences, N of them, with HTML entities resolved.
        ratings: N mean ratings by 15 people or more each, from -4 (most negative) to 4.
        groups: N names of what must stay on one side of a split: the review or article that a sentence is from,
            merged with those that hold nearly the same sentence.
    """

    name: str
    texts: tuple[str, ...]
    ratings: tuple[float, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """Texts with labels, ready to be split, drawn from and tokenized.

    Args:
        name: What the data is called in reports.
        texts: N texts.
        labels: N labels: ints in [0, k) that index `label_names`, or floats for regression.
        groups: N names of what must stay on one side of a split.
        label_names: The k classes; empty means regression.
        pairs: N second texts, for tasks on pairs of texts; empty if there are none.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[float, ...]
    groups: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return N."""
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return the examples at `indices`, in that order."""
        return replace(
            self,
            texts=tuple(self.texts[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            groups=tuple(self.groups[i] for i in indices),
            pairs=tuple(self.pairs[i] for i in indices) if self.pairs else (),
        )

    def to_dataset(self) -> Dataset:
        """Return a data set with the columns `text`, `text_pair` (if there are pairs) and `label`."""
        columns: dict[str, tuple[Any, ...]] = {"text": self.texts, "label": self.labels}
        kind = ClassLabel(names=list(self.label_names)) if self.label_names else Value("float32")
        features = Features(text=Value("string"), label=kind)
        if self.pairs:
            columns["text_pair"], features["text_pair"] = self.pairs, Value("string")
        return Dataset.from_dict(columns, features=features)


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; no group is in more than one of them."""

    train: Examples
    validation: Examples
    test: Examples


def load_corpora(folder: Path) -> dict[str, Corpus]:
    """Read the four corpora of Hutto and Gilbert (ICWSM 2014).

    The ids of "amazon" and "nyt" are `<review or article>_<sentence>`. Those of "movie" and "tweets" are plain numbers
    that say nothing about the origin. What else would leak from training into test is nearly equal text: the tweets
    hold about 200 rewritings of other tweets. So groups also merge where two sentences share at least three quarters
    of their distinct words.

    Args:
        folder: Where the files lie: `fetch_assets().corpora`.

    Returns:
        The corpora by name: "movie", "amazon", "nyt", "tweets".

    Raises:
        DataError: A file is missing, or one of its lines is not an id, a rating in [-4, 4] and a text.
    """
    return {name: _read(name, Path(folder) / file) for name, file in _FILES.items()}


def _read(name: str, path: Path) -> Corpus:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"Corpus {name!r} cannot be read: {error}. Get it with `fetch_assets()`.") from error
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty. Get it with `fetch_assets()`.")
    ids, ratings, texts = zip(*rows, strict=True)
    origins = [f"{name}-{identifier.partition('_')[0]}" for identifier in ids]
    return Corpus(name, texts, ratings, _link(texts, origins))


def _row(line: bytes, where: str) -> tuple[str, float, str]:
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError:
        # The files we pin are UTF-8 throughout. The README beside them is Windows-1252, so a changed line may be too.
        _logger.warning("%s is not UTF-8, reading it as Windows-1252.", where)
        decoded = line.decode("cp1252", errors="replace")
    fields = decoded.split("\t")
    try:
        identifier, rating, text = fields[0], float(fields[1]), html.unescape(fields[2]).strip()
    except (IndexError, ValueError):
        identifier, rating, text = "", math.nan, ""
    if not (identifier and text and -4 <= rating <= 4 and len(fields) == 3):
        raise DataError(
            f"{where} must be an id, a rating in [-4, 4] and a text, separated by tabs, got {decoded!r}. "
            "Get the file anew with `fetch_assets()`."
        )
    return identifier, rating, text


def _link(texts: Sequence[str], origins: Sequence[str]) -> tuple[str, ...]:
    """Merge the origins of nearly equal texts, transitively.

    Two word sets that overlap (Jaccard) by at least `_ALIKE` share a word among the rarest few of each, so only texts
    with such a word in common are compared.
    """
    words = [frozenset(re.findall(r"\w+", text.casefold())) or frozenset([text]) for text in texts]
    counts = Counter(word for bag in words for word in bag)
    parent = {origin: origin for origin in origins}

    def root(origin: str) -> str:
        while parent[origin] != origin:
            parent[origin] = origin = parent[parent[origin]]
        return origin

    seen: dict[str, list[int]] = defaultdict(list)
    for i, bag in enumerate(words):
        ranked = sorted(bag, key=lambda word: (counts[word], word))
        rarest = ranked[: len(bag) - math.ceil(_ALIKE * len(bag)) + 1]
        for j in {j for word in rarest for j in seen[word]}:
            if len(bag & words[j]) >= _ALIKE * len(bag | words[j]):
                parent[root(origins[i])] = root(origins[j])
        for word in rarest:
            seen[word].append(i)
    return tuple(root(origin) for origin in origins)


def binary(corpus: Corpus, neutral: float = 0.5) -> Examples:
    """Label a corpus by the sign of its ratings, leaving the neutral ones out.

    Why 0.5: the raters of a sentence differ with a standard deviation of about 0.75, so the mean of 20 has a standard
    error of about 0.17 and the sign of a small mean is chance. Of the sentences with |rating| >= 0.5, 99% have a mean
    more than two standard errors from zero, in each corpus; with 0.25 it is 92% for "nyt". The price is 5% of
    "movie", 20% of "amazon", 43% of "nyt" and 18% of "tweets".

    Args:
        corpus: What to label.
        neutral: Sentences with |rating| < `neutral`, and those rated exactly 0, are left out; in [0, 4).

    Returns:
        The examples with the labels 0 ("negative") and 1 ("positive").

    Raises:
        ValueError: `neutral` is not in [0, 4).
    """
    if not 0 <= neutral < 4:
        raise ValueError(f"`neutral` must be in [0, 4), got {neutral}.")
    kept = [i for i, rating in enumerate(corpus.ratings) if rating != 0 and abs(rating) >= neutral]
    labels = tuple(int(rating > 0) for rating in corpus.ratings)
    return Examples(corpus.name, corpus.texts, labels, corpus.groups, ("negative", "positive")).take(kept)


def group(keys: Iterable[object]) -> tuple[str, ...]:
    """Name the groups of examples: those with equal keys get the same name.

    Args:
        keys: One per example; equal ones look alike under `repr`.
    """
    first: dict[str, int] = {}
    return tuple(str(first.setdefault(repr(key), i)) for i, key in enumerate(keys))


def draw_order(seed: int, keys: Sequence[Hashable]) -> list[int]:
    """Return the indices of `keys` in an order drawn by `seed`: a hash, so the same on every machine and Python."""
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest())


def split(examples: Examples, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> Splits:
    """Split into training, validation and test parts, whole groups at a time.

    Args:
        examples: What to split.
        validation: Fraction of the examples for validation, in [0, 1); met up to one group. 0 leaves that part empty.
        test: Fraction of the examples for test, in (0, 1); met up to one group.
        seed: Draws the groups. The same seed gives the same parts everywhere.

    Returns:
        The three parts, each in the order of `examples`.

    Raises:
        ValueError: A fraction is out of range, or a part would be empty or lack a class that occurs.
    """
    if not (validation >= 0 and test > 0 and validation + test < 1):
        raise ValueError(
            f"`validation` must be in [0, 1) and `test` in (0, 1), with a sum below 1, got {validation} and {test}: "
            "what they leave is for training."
        )
    sizes = Counter(examples.groups)
    names = list(sizes)
    part_of, filled = {}, 0
    for i in draw_order(seed, names):
        share = (filled + sizes[names[i]] / 2) / len(examples)  # the middle of the group decides
        part_of[names[i]] = "test" if share < test else "validation" if share < test + validation else "train"
        filled += sizes[names[i]]
    parts = {}
    for part in ("train", "validation", "test"):
        parts[part] = examples.take([i for i, group in enumerate(examples.groups) if part_of[group] == part])
        lacking = (set(examples.labels) if examples.label_names else set()) - set(parts[part].labels)
        if (lacking or not parts[part].texts) and (part != "validation" or validation):
            missing = [examples.label_names[int(label)] for label in sorted(lacking)] or "any example"
            raise ValueError(f"The {part} part lacks {missing}: use more data, larger fractions or another `seed`.")
    return Splits(**parts)


def subset(examples: Examples, size: int, seed: int = 0) -> Examples:
    """Draw a training set of a given size, with the class balance of the whole.

    With the same seed a smaller draw is contained in a larger one, so that curves over sizes are comparable. Every
    class is in it at least once. For regression the draw is a plain random one.

    Args:
        examples: What to draw from.
        size: Number of examples to draw, in [k, N]; at least 1.
        seed: Draws the examples.

    Returns:
        `size` examples, in the order of `examples`.

    Raises:
        ValueError: `size` is out of range.
    """
    strata = examples.labels if examples.label_names else (0,) * len(examples)
    classes = Counter(strata)
    if not max(1, len(classes)) <= size <= len(examples):
        raise ValueError(f"`size` must be in [{max(1, len(classes))}, {len(examples)}], got {size}.")
    ranks: Counter[float] = Counter()
    places: list[tuple[bool, float, int]] = []
    for i in draw_order(seed, range(len(examples))):
        stratum = strata[i]
        # Places by Sainte-Lague's divisors: proportional to the classes, and a larger draw never takes one back.
        places.append((ranks[stratum] > 0, (ranks[stratum] + 0.5) / classes[stratum], i))
        ranks[stratum] += 1
    return examples.take(sorted(i for _, _, i in sorted(places)[:size]))
