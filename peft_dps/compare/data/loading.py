"""Data sets from the Hugging Face Hub or from files, and the examples that the user's own hold."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.exceptions import DatasetsError
from datasets.features import ClassLabel
from datasets.load import load_dataset

from peft_dps.compare.data.examples import DataError, Examples, group_names

FORMATS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

_NOTHING = ("NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "-")
"""What stands among numbers where there is none."""


def load_examples(
    source: str,
    text_columns: str | Sequence[str],
    label_column: str,
    *,
    group_column: str | None = None,
    config: str | None = None,
    least_classes: int = 2,
) -> dict[str, Examples]:
    """Load the user's own data from the Hugging Face Hub or from a csv, tsv, json, jsonl or parquet file.

    Strings, ints and bools are classes, mapped to 0..k-1 in sorted order over all splits; a `ClassLabel` column keeps
    its own order. A float column means regression: to regress on an int column, store it as float. Of several splits,
    those without any label are left out. In csv and tsv only an empty field is a missing one.

    Args:
        source: A Hub id, or a path.
        text_columns: One column of texts, or two for pairs of texts.
        label_column: The column to predict.
        group_column: Rows equal in this column stay on one side of a split. Without it, rows with equal texts do.
        config: The configuration of the Hub data set, where it has several.
        least_classes: How many classes there have to be.

    Returns:
        Examples by split name; a file is one split, "train".

    Raises:
        ValueError: A column is not in the data or an argument is malformed.
        DataError: The data cannot be loaded, or has missing or unusable texts or labels.
    """
    columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
    if len(columns) not in (1, 2):
        raise ValueError(f"`text_columns` must name 1 or 2 columns, got {columns}.")
    loaded = load_splits(source, name=config)
    asked = {"text_columns": columns, "label_column": [label_column], "group_column": [group_column or label_column]}
    require_columns(loaded, asked)
    loaded = _labelled(loaded, label_column)
    labels, label_names = _labels({part: data.select_columns([label_column]) for part, data in loaded.items()})
    if 0 < len(label_names) < least_classes:
        raise DataError(
            f"Column {label_column!r} must hold at least {least_classes} classes, got only {list(label_names)}. Name "
            "another column."
        )
    result = {}
    for part, data in loaded.items():
        texts = [strings(data, column, part) for column in columns]
        groups = group_names(data[group_column][:] if group_column else zip(*texts, strict=True))
        result[part] = Examples(source, texts[0], labels[part], groups, label_names, *texts[1:])
    return result


def load_splits(source: str | Path, split: str | None = None, **options: Any) -> dict[str, Dataset]:
    """Load from the Hub or from a file as it is.

    Args:
        source: A Hub id, or the path of a file.
        split: The split of a Hub data set to load; None for all. A file is one split, "train".
        **options: For `datasets.load_dataset`.

    Raises:
        ValueError: It is a file of a format that is not known.
        DataError: It cannot be loaded or is empty.
    """
    path, where = Path(source), str(source)
    if path.suffix in FORMATS or path.exists():
        where, of_file = _file_options(path)
        options.update(of_file)
    try:
        loaded = load_dataset(where, split=split, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"`source` {str(source)!r} cannot be loaded: {error} (cause: {error.__cause__}). Check the Hub id with "
            "its `config` and the network, or that the file is what its suffix says."
        ) from error
    parts = dict(loaded) if split is None else {split: loaded}
    rows = {part: len(data) for part, data in parts.items()}
    if not rows or 0 in rows.values():
        raise DataError(f"`source` {str(source)!r} must have rows in every split, got {rows}.")
    return parts


def _file_options(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the format of a file as `datasets` names it, and how to read it."""
    if not path.is_file():
        raise DataError(f"`source` must be a Hub id or a file that exists, got {str(path)!r}: no such file.")
    if path.suffix not in FORMATS:
        raise ValueError(f"`source` must be a file of {', '.join(FORMATS)}, got {path.name}.")
    options: dict[str, Any] = {"data_files": {"train": escape(str(path))}}
    kind = FORMATS[path.suffix]
    if kind in ("csv", "tsv"):
        options.update(keep_default_na=False, na_values=[""])  # "None" and "NA" are words like others
    if kind == "tsv":
        kind, options["sep"] = "csv", "\t"
        if _has_plain_quotes(path):
            options["quoting"] = csv.QUOTE_NONE
    return kind, options


def _has_plain_quotes(path: Path) -> bool:
    """Tell whether quotation marks in a tsv file are part of its texts: one opens a field and does not close it.

    Rows of one length have no field that goes on in the next line, for which a file would be quoted.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file]
    unclosed = any(field.startswith('"') and not field[1:].endswith('"') for row in rows for field in row)
    return unclosed and len({len(row) for row in rows}) == 1


def require_columns(loaded: Mapping[str, Dataset], asked: Mapping[str, Sequence[str]]) -> None:
    """Check that all splits have the columns.

    Args:
        loaded: The splits.
        asked: Per argument of the user, the columns it names.

    Raises:
        ValueError: One is missing.
    """
    for part, data in loaded.items():
        for argument, names in asked.items():
            if absent := [name for name in names if name not in data.column_names]:
                raise ValueError(
                    f"`{argument}` must name columns of the data, got {', '.join(map(repr, absent))}; "
                    f"the columns of split {part!r} are {', '.join(map(repr, data.column_names))}."
                )


def strings(data: Dataset, column: str, part: str) -> tuple[str, ...]:
    """Return a column of texts of a split.

    Raises:
        DataError: A row holds no text.
    """
    values = data[column][:]
    if wrong := [i for i, value in enumerate(values) if not isinstance(value, str)]:
        raise DataError(
            f"Column {column!r} must hold texts, got {values[wrong[0]]!r} in row {wrong[0]} of split {part!r} "
            f"({len(wrong)} such rows). Remove these rows or name another column in `text_columns`."
        )
    return tuple(values)


def _is_missing(label: Any, feature: Any) -> bool:
    # A ClassLabel of -1 is the Hub's way to withhold the labels of a test split.
    withheld = isinstance(feature, ClassLabel) and label == -1
    return label is None or withheld or (isinstance(label, float) and not math.isfinite(label))


def _labelled(loaded: Mapping[str, Dataset], column: str) -> dict[str, Dataset]:
    """Leave out splits without any label, such as texts to pretrain on or a withheld test, if others have some."""
    kept = {
        part: data
        for part, data in loaded.items()
        if not all(_is_missing(label, data.features[column]) for label in data[column][:])
    }
    return kept or dict(loaded)


def _labels(columns: Mapping[str, Dataset]) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """The labels by split, and the class names: none for regression."""
    column, feature = next((name, kind) for data in columns.values() for name, kind in data.features.items())
    values = {part: data[column][:] for part, data in columns.items()}
    dtype = str(getattr(feature, "dtype", None) or type(feature).__name__)
    named = isinstance(feature, ClassLabel)
    numbers = dtype in ("string", "large_string") and _are_numbers(values)
    for part, labels in values.items():
        bad = [i for i, label in enumerate(labels) if _is_missing(label, feature) or (numbers and label in _NOTHING)]
        if bad:
            raise DataError(
                f"Column {column!r} has no label in row {bad[0]} of split {part!r} ({len(bad)} such rows). Remove "
                "these rows."
            )
    if named:
        return {part: tuple(labels) for part, labels in values.items()}, tuple(feature.names)
    if re.match("float|double", dtype):
        return {part: tuple(labels) for part, labels in values.items()}, ()
    if not re.match("u?int|bool|large_string|string", dtype):
        raise DataError(f"Column {column!r} must hold strings, ints, bools or floats to be predicted, got {dtype}.")
    classes = sorted({label for labels in values.values() for label in labels})
    index = {label: i for i, label in enumerate(classes)}
    return {part: tuple(index[label] for label in labels) for part, labels in values.items()}, tuple(map(str, classes))


def _are_numbers(values: Mapping[str, Sequence[Any]]) -> bool:
    """Tell whether texts are numbers, but for some that stand for none."""
    words = {label for labels in values.values() for label in labels if label is not None} - set(_NOTHING)
    try:
        return bool([float(word) for word in words])
    except ValueError:
        return False
