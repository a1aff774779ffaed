"""The four rated corpora of the embedded task: read, grouped, labelled."""

from __future__ import annotations

import html
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_dps.compare.data.examples import DataError, Examples

_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
_NEUTRAL = 0.5
_ALIKE = 0.75  # a binary fraction, so that the arithmetic of `_link` is exact


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
        DataError: A file is missing, or is not lines of an id, a rating and a text. More is not checked: whoever
            fetched the files has compared their hashes.
    """
    return {name: _read_corpus(name, Path(folder) / file) for name, file in _FILES.items()}


def _read_corpus(name: str, path: Path) -> Corpus:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # form feeds are in texts
        rows = [line.split("\t") for line in lines if line.strip()]
        identifiers, ratings, texts = zip(*rows, strict=True)
        rated = tuple(map(float, ratings))
    except (OSError, ValueError) as error:
        raise DataError(f"Corpus {name!r} cannot be read: {error}. Get it with `fetch_assets()`.") from error
    origins = [f"{name}-{identifier.partition('_')[0]}" for identifier in identifiers]
    plain = tuple(html.unescape(text).strip() for text in texts)
    return Corpus(name, plain, rated, _link(plain, origins))


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


def binary(corpus: Corpus) -> Examples:
    """Label a corpus by the sign of its ratings, leaving the neutral ones out, those with |rating| < 0.5.

    Why 0.5: the raters of a sentence differ with a standard deviation of about 0.75, so the mean of 20 has a standard
    error of about 0.17 and the sign of a small mean is chance. Of the sentences with |rating| >= 0.5, 99% have a mean
    more than two standard errors from zero, in each corpus; with 0.25 it is 92% for "nyt". The price is 5% of
    "movie", 20% of "amazon", 43% of "nyt" and 18% of "tweets".

    Args:
        corpus: What to label.

    Returns:
        The examples with the labels 0 ("negative") and 1 ("positive").
    """
    kept = [i for i, rating in enumerate(corpus.ratings) if abs(rating) >= _NEUTRAL]
    labels = tuple(int(rating > 0) for rating in corpus.ratings)
    return Examples(corpus.name, corpus.texts, labels, corpus.groups, ("negative", "positive")).take(kept)
