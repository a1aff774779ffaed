"""GLUE's nine tasks (Wang et al., arXiv:1804.07461), tested on the validation splits, whose labels are public."""

from __future__ import annotations

from pathlib import Path

from peft_dps.compare.data.published import ENTAILED_OR_NOT, ENTAILMENT, Published
from peft_dps.compare.data.task import Task, build_task
from peft_dps.compare.settings import Settings

_PAIR = ("sentence1", "sentence2")
_MNLI_TESTS = ("validation_matched", "validation_mismatched")


def _glue(name: str, columns: tuple[str, ...], classes: tuple[str, ...], *metrics: str) -> Published:
    tests = _MNLI_TESTS if name == "mnli" else ("validation",)
    return Published(name, "nyu-mll/glue", columns, classes, config=name, metrics=metrics, tests=tests)


DATA = {
    data.name: data
    for data in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
        _glue("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
        _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), "accuracy", "f1"),
        _glue("stsb", _PAIR, (), "pearson", "spearman"),
        _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy", "f1"),
        _glue("mnli", ("premise", "hypothesis"), ENTAILMENT, "accuracy"),
        _glue("qnli", ("question", "sentence"), ENTAILED_OR_NOT, "accuracy"),
        _glue("rte", _PAIR, ENTAILED_OR_NOT, "accuracy"),
        _glue("wnli", _PAIR, ("not_entailment", "entailment"), "accuracy"),
    )
}


def glue_task(name: str, settings: Settings, folder: Path | None = None) -> Task:
    """Load one of GLUE's tasks. The score is the mean of the task's metrics.

    Args:
        name: One of `DATA`.
        settings: Sizes of the splits.
        folder: Local folder with `<name>/<split>.parquet`; None for the Hub.

    Raises:
        DataError: The data cannot be loaded or is not what it should be.
    """
    data = DATA[name]
    tests = {
        name if split == "validation" else split.removeprefix("validation_"): data.load(split, folder)
        for split in data.tests
    }
    return build_task(f"glue/{name}", data.load("train", folder), tests, settings, data.metrics)
