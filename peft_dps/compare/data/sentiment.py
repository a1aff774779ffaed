"""The embedded task: sentiment of sentences, trained on movie reviews, tested on four domains."""

from __future__ import annotations

from pathlib import Path

from peft_dps.compare.data.corpora import Corpus, binary, load_corpora
from peft_dps.compare.data.examples import Examples, train_and_test
from peft_dps.compare.data.task import Task, build_task
from peft_dps.compare.settings import Settings


def sentiment_task(corpora: Path, settings: Settings, *, regression: bool = False) -> Task:
    """Load the task: positive or negative, or as a regression of the mean rating.

    Args:
        corpora: Folder of the four corpora.
        settings: Sizes of the splits.
        regression: Whether to predict the rating, and to keep the neutral sentences.
    """
    label = _ratings if regression else binary
    examples = {name: label(corpus) for name, corpus in load_corpora(corpora).items()}
    training, test = train_and_test(examples.pop("movie"))
    name = "sentiment-regression" if regression else "sentiment"
    metrics = ("pearson", "spearman") if regression else ("accuracy",)
    return build_task(name, training, {"movie": test, **examples}, settings, metrics)


def _ratings(corpus: Corpus) -> Examples:
    return Examples(corpus.name, corpus.texts, corpus.ratings, corpus.groups)
