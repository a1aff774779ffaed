"""A task: what to train on, what to choose by, and what to test on, in domain and out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets.arrow_dataset import Dataset
from transformers import PreTrainedTokenizerBase

from peft_dps.compare.data.examples import DataError, Examples, hold_out, subset
from peft_dps.compare.data.metrics import check_metrics
from peft_dps.compare.data.probe import Probe
from peft_dps.compare.settings import VALIDATION_SIZE, Settings


@dataclass(frozen=True)
class Task:
    """Examples to train on, to choose by and to test on.

    Attributes:
        name: What the command line and the tables call it.
        train: What to train on, or to draw training examples from.
        validation: Held out of the training data; hyper-parameters are chosen on it, and nothing is reported of it.
        tests: Per domain, what to test on; the first is the domain that is trained on.
        metrics: Names of the metrics; the score is their mean.
        merged: Per domain with coarser classes than the training data: the domain's class of each class trained on.
        probes: What the model is asked before and after training.
        pretrained: Per name of a probe, what the model scored before.
    """

    name: str
    train: Examples
    validation: Examples
    tests: dict[str, Examples]
    metrics: tuple[str, ...]
    merged: dict[str, tuple[int, ...]] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    pretrained: dict[str, float] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to predict rather than classes."""
        return not self.train.label_names

    @property
    def num_labels(self) -> int:
        """Outputs that a model of the task has."""
        return max(1, len(self.train.label_names))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples by split, test domains as "test/<domain>", probes as "probe/<name>"."""
        tests = {f"test/{name}": len(test) for name, test in self.tests.items()}
        probes = {f"probe/{probe.name}": len(probe) for probe in self.probes}
        return {"train": len(self.train), "validation": len(self.validation), **tests, **probes}

    def draw(self, size: int | None, seed: int) -> Task:
        """Draw training examples, stratified; validation and tests stay.

        Args:
            size: How many; None for all.
            seed: Draws them.

        Raises:
            ValueError: There are not that many.
        """
        if size is None:
            return self
        try:
            return replace(self, train=subset(self.train, size, seed))
        except ValueError as error:
            raise ValueError(
                f"`train_size` {size} does not fit task {self.name!r}, which has {len(self.train)} training examples "
                f"beside {len(self.validation)} for validation: {error}"
            ) from error

    def fingerprint(self) -> str:
        """Return 16 hex digits of a hash over all examples of all splits."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, *self.tests.values()):
            digest.update(json.dumps([part.texts, part.pairs, part.labels, part.label_names]).encode())
        return digest.hexdigest()[:16]


def build_task(
    name: str,
    training: Examples,
    tests: Mapping[str, Examples],
    settings: Settings,
    metrics: Sequence[str] = (),
    merged: Mapping[str, tuple[int, ...]] | None = None,
) -> Task:
    """Build a task: hold out the validation split, and draw the test examples.

    Args:
        name: Name of the task.
        training: All examples that may be trained on.
        tests: Per domain, all test examples; the first is the domain that is trained on.
        settings: Sizes of the validation split and the tests.
        metrics: Names of metrics; by default accuracy, or Pearson's correlation for a regression.
        merged: As in `Task`.

    Raises:
        ValueError: A metric does not fit, or there are too few examples.
        DataError: A test has other labels than the training data.
    """
    merged = dict(merged or {})
    for domain, test in tests.items():
        if domain not in merged and test.label_names != training.label_names:
            raise DataError(
                f"The data {domain!r} has the labels {test.label_names}, the training data has "
                f"{training.label_names}. Give both the same labels."
            )
    metrics = tuple(metrics) or (("accuracy",) if training.label_names else ("pearson",))
    check_metrics(metrics, len(training.label_names))
    held_out = VALIDATION_SIZE if settings.validation_size is None else settings.validation_size
    train, validation = hold_out(training, held_out)
    drawn = {domain: at_most(test, settings.test_size) for domain, test in tests.items()}
    return Task(name, train, validation, drawn, metrics, merged)


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


def at_most(examples: Examples, size: int | None) -> Examples:
    """Draw so many examples if there are more, always the same ones; None for all."""
    return subset(examples, size) if size is not None and len(examples) > size else examples
