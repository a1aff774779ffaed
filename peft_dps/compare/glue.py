"""GLUE's nine tasks (Wang et al., arXiv:1804.07461), tested on the validation splits, whose labels are public."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft_dps.compare.plan import Settings
from peft_dps.compare.published import ENTAILED_OR_NOT, ENTAILMENT, Published
from peft_dps.compare.task import Task, build_task

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class _Glue:
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    tests: tuple[str, ...] = ("validation",)


_PAIR = ("sentence1", "sentence2")
_TASKS = {
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": _Glue(("sentence",), ("negative", "positive")),
    "mrpc": _Glue(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": _Glue(_PAIR, (), ("pearson", "spearman")),
    "qqp": _Glue(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": _Glue(
        ("premise", "hypothesis"),
        ENTAILMENT,
        tests=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _Glue(("question", "sentence"), ENTAILED_OR_NOT),
    "rte": _Glue(_PAIR, ENTAILED_OR_NOT),
    "wnli": _Glue(_PAIR, ("not_entailment", "entailment")),
}
NAMES = tuple(_TASKS)


def published(name: str) -> Published:
    """Return GLUE's data set of that name."""
    task = _TASKS[name]
    return Published(name, HUB, task.columns, task.classes, config=name)


def glue_task(name: str, settings: Settings, folder: Path | None = None) -> Task:
    """Load one of GLUE's tasks.

    The score is the mean of the task's metrics: Matthews' correlation for CoLA, accuracy and F1 for MRPC and QQP,
    Pearson's and Spearman's correlation for STS-B, accuracy for the others.

    Args:
        name: One of `NAMES`.
        settings: Sizes of the splits.
        folder: Local folder with `<name>/<split>.parquet`; None for the Hub.

    Raises:
        DataError: The data cannot be loaded or is not what it should be.
    """
    task, data = _TASKS[name], published(name)
    tests = {
        name if split == "validation" else split.removeprefix("validation_"): data.load(split, folder)
        for split in task.tests
    }
    return build_task(f"glue/{name}", data.load("train", folder), tests, settings, task.metrics)
