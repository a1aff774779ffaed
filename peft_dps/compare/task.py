"""A task: what to train on, and what to test on, in domain and out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.arrow_dataset import Dataset
from transformers import PreTrainedTokenizerBase

from peft_dps.compare.corpora import DataError, Examples, binary, load_corpora, split, subset
from peft_dps.compare.user_data import load_user_data


@dataclass(frozen=True)
class Task:
    """Training and test examples.

    Attributes:
        name: Name of the domain that is trained on.
        train: What to train on.
        tests: Per domain, what to test on; the first is the domain that is trained on.
    """

    name: str
    train: Examples
    tests: dict[str, Examples]

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to predict rather than classes."""
        return not self.train.label_names

    @property
    def num_labels(self) -> int:
        """Outputs that a model of the task has."""
        return max(1, len(self.train.label_names))

    @property
    def metric(self) -> str:
        """Name of the figure of merit."""
        return "correlation" if self.is_regression else "accuracy"


def sentiment_task(corpora: Path, train_size: int, test_size: int, seed: int) -> Task:
    """Positive or negative: trained on sentences of movie reviews, tested on four domains.

    Args:
        corpora: Folder of the four corpora.
        train_size: Training sentences, drawn stratified.
        test_size: Test sentences per domain at most, drawn stratified.
        seed: Seed of the draw of training sentences; the test sentences are always the same.
    """
    examples = {name: binary(corpus) for name, corpus in load_corpora(corpora).items()}
    movie = split(examples.pop("movie"))
    tests = {"movie": movie.test, **examples}
    return Task(
        name="movie",
        train=subset(movie.train, train_size, seed=seed),
        tests={name: _at_most(test, test_size) for name, test in tests.items()},
    )


def user_task(
    source: str,
    text_columns: list[str],
    label_column: str,
    others: dict[str, str],
    train_size: int | None,
    test_size: int,
    seed: int,
) -> Task:
    """Build a task from the user's own data.

    A split named "test", else "validation", is tested on; without either a fifth of the data is split off.

    Args:
        source: Hub id or path of the data to train on.
        text_columns: One column of texts, or two for pairs.
        label_column: The column to predict.
        others: Per name of a further domain, the Hub id or path of its test data, with the same columns and labels.
        train_size: Training examples, drawn stratified; None for all.
        test_size: Test examples per domain at most, drawn stratified.
        seed: Seed of the draws.

    Raises:
        DataError: If the data cannot be read, or a further domain has other labels.
    """
    parts = load_user_data(source, text_columns, label_column)
    name = Path(source).stem
    if "train" not in parts:
        raise DataError(f"The data {source!r} has no split 'train', only {sorted(parts)}.")
    train, test = parts["train"], parts.get("test", parts.get("validation"))
    if test is None:
        halves = split(train)
        train, test = halves.train, halves.test
    tests = {name: test}
    for other, other_source in others.items():
        loaded = load_user_data(other_source, text_columns, label_column)
        tests[other] = loaded.get("test", loaded.get("validation", next(iter(loaded.values()))))
        if tests[other].label_names != train.label_names:
            raise DataError(
                f"The data {other!r} has the labels {tests[other].label_names}, the training data has "
                f"{train.label_names}. Give both the same labels."
            )
    if train_size is not None:
        train = subset(train, train_size, seed=seed)
    return Task(name, train, {key: _at_most(value, test_size) for key, value in tests.items()})


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Turn texts into token ids; labels become the column `labels`.

    Args:
        examples: What to tokenize.
        tokenizer: The model's tokenizer.
        max_length: Longest sequence, in tokens; the rest is cut off.
    """

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in ("text", "text_pair") if column in batch]
        encoded: dict[str, Any] = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    data = examples.to_dataset()
    tokenized: Dataset = data.map(encode, batched=True, remove_columns=data.column_names)
    return tokenized


def _at_most(examples: Examples, size: int) -> Examples:
    return subset(examples, size) if len(examples) > size else examples
