"""The user's own data as a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_dps.compare.data.examples import DataError, Examples, train_and_test
from peft_dps.compare.data.loading import load_examples
from peft_dps.compare.data.task import Task, build_task
from peft_dps.compare.settings import Settings


@dataclass(frozen=True)
class OwnData:
    """Where the user's data lies, and what is in it.

    Attributes:
        source: Hub id, or path of a csv, tsv, json, jsonl or parquet file, with what to train on.
        test: Hub id or path of the test data; by default the source's split "test", else "validation", else a fifth
            of the training data.
        text_columns: One column of texts, or two for pairs.
        label_column: The column to predict: strings, ints and bools are classes, floats mean regression.
        group_column: Rows that are equal here are never on both sides of a split.
        config: Configuration of a Hub data set.
        others: Per name of a further domain to test on, the Hub id or path of its data.
        metrics: Names of metrics; by default accuracy, or Pearson's correlation.
        name: What to call the task; by default after the source.
    """

    source: str
    test: str | None = None
    text_columns: Sequence[str] = ("text",)
    label_column: str = "label"
    group_column: str | None = None
    config: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    name: str | None = None

    @property
    def title(self) -> str:
        """What the task is called."""
        return self.name or Path(self.source).stem

    def task(self, settings: Settings) -> Task:
        """Load the data.

        Args:
            settings: Sizes of the splits.

        Raises:
            DataError: The data cannot be read, or a test has labels that the training data does not have.
            ValueError: A column is not in the data, a metric does not fit, or a further domain has the test's name.
        """
        parts = self._load(self.source, self.config)
        if "train" not in parts:
            raise DataError(f"The data {self.source!r} has no split 'train', only {sorted(parts)}.")
        training, domain = parts["train"], "test" if "test" in parts or "validation" not in parts else "validation"
        if self.test is not None:
            domain, test = Path(self.test).stem, self._test(self.test)
        elif domain in parts:
            test = parts[domain]
        else:
            training, test = train_and_test(training)
        if domain in self.others:
            raise ValueError(f"`other` must not have the name of the test data, got {domain!r}: give it another name.")
        tests = {domain: test, **{other: self._test(source) for other, source in self.others.items()}}
        aligned = {domain: _align(examples, training, domain) for domain, examples in tests.items()}
        return build_task(self.title, training, aligned, settings, self.metrics)

    def _load(self, source: str, config: str | None = None, least_classes: int = 2) -> dict[str, Examples]:
        columns = self.text_columns, self.label_column
        return load_examples(
            source, *columns, group_column=self.group_column, config=config, least_classes=least_classes
        )

    def _test(self, source: str) -> Examples:
        parts = self._load(source, least_classes=1)  # a test may lack classes
        return parts.get("test", parts.get("validation", next(iter(parts.values()))))


def _align(test: Examples, training: Examples, domain: str) -> Examples:
    """Number the classes of a test as those of the training data: a test may lack some."""
    if test.label_names == training.label_names:
        return test
    unknown = sorted(set(test.label_names) - set(training.label_names))
    if unknown or not test.label_names:
        what = f"the labels {unknown}" if unknown else "numbers as labels"
        raise DataError(
            f"The data {domain!r} has {what}, and the training data has {list(training.label_names) or 'numbers'}. "
            "Give both the same labels."
        )
    number = [training.label_names.index(name) for name in test.label_names]
    labels = tuple(number[int(label)] for label in test.labels)
    return Examples(test.name, test.texts, labels, test.groups, training.label_names, test.pairs)
