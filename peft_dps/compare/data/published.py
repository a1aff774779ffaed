"""Published data sets, from the Hugging Face Hub or from a local folder of files with the Hub's columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets.arrow_dataset import Dataset
from datasets.features import ClassLabel

from peft_dps.compare.data.examples import DataError, Examples, group_names
from peft_dps.compare.data.loading import FORMATS, load_splits, require_columns, strings

ENTAILED_OR_NOT = ("entailment", "not_entailment")
ENTAILMENT = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Published:
    """A data set as it was published.

    Attributes:
        name: What it is called here, and the name of its folder among local files.
        hub: Its id on the Hub.
        columns: The column of texts, or the two of pairs.
        classes: Names of the classes, as the Hub numbers them; empty for a regression.
        config: Its configuration on the Hub.
        revision: Its revision on the Hub.
        label: The column of labels.
        synonyms: Other names that stand for a class in the column.
        without_label: Whether rows without a label are part of it, to be left out.
        metrics: Names of its metrics.
        tests: The splits that are tested on.
    """

    name: str
    hub: str
    columns: tuple[str, ...]
    classes: tuple[str, ...] = ()
    config: str | None = None
    revision: str | None = None
    label: str = "label"
    synonyms: Mapping[str, str] | None = None
    without_label: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    tests: tuple[str, ...] = ("validation",)

    def load(self, split: str, folder: Path | None) -> Examples:
        """Load a split.

        Args:
            split: Its name on the Hub.
            folder: Where `<name>/<split>.parquet` (or .csv, .tsv, .json, .jsonl) lies; None for the Hub.

        Raises:
            DataError: It cannot be loaded, or its labels are not those of the data set.
            ValueError: A column is missing.
        """
        if folder is None:
            data = load_splits(self.hub, split, name=self.config, revision=self.revision)[split]
        else:
            data = load_splits(self._file(split, folder))["train"]
        require_columns({split: data}, {"columns": self.columns, "label": [self.label]})
        labels = self._labels(data, split)
        kept = [i for i, label in enumerate(labels) if label is not None]
        data = data.select(kept)
        texts = [strings(data, column, split) for column in self.columns]
        found = tuple(label for label in labels if label is not None)
        return Examples(self.name, texts[0], found, group_names(zip(*texts, strict=True)), self.classes, *texts[1:])

    def _file(self, split: str, folder: Path) -> Path:
        candidates = [folder / self.name / f"{split}{suffix}" for suffix in (".parquet", *FORMATS)]
        for path in candidates:
            if path.is_file():
                return path
        raise DataError(
            f"`data_folder` {str(folder)!r} has no {self.name}/{split}.parquet. Put the file there, with the columns "
            f"{', '.join((*self.columns, self.label))}, or leave `data_folder` out to load {self.hub} from the Hub."
        )

    def _labels(self, data: Dataset, split: str) -> list[float | None]:
        values = data[self.label][:]
        feature = data.features[self.label]
        if isinstance(feature, ClassLabel):
            values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
        return [self._label(value, row, split) for row, value in enumerate(values)]

    def _label(self, value: object, row: int, split: str) -> float | None:
        synonyms = self.synonyms or {}
        if value in (None, "", "-", -1) and self.without_label:
            return None
        if isinstance(value, str):
            name = synonyms.get(value, value)
            if name in self.classes:
                return self.classes.index(name)
        elif isinstance(value, (int, float)):
            if not self.classes:
                return float(value)
            if value in range(len(self.classes)):
                return int(value)
        raise DataError(
            f"Column {self.label!r} of {self.name}/{split} must hold {self._expected()}, got {value!r} in row {row}. "
            "Leave out the rows without a label, or map the labels."
        )

    def _expected(self) -> str:
        if not self.classes:
            return "numbers"
        return f"{', '.join(self.classes)} or their numbers 0 to {len(self.classes) - 1}"
