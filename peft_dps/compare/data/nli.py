"""Natural language inference out of domain: trained on one data set, tested on all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft_dps.compare.data import glue
from peft_dps.compare.data.examples import Examples
from peft_dps.compare.data.published import ENTAILED_OR_NOT, ENTAILMENT, Published
from peft_dps.compare.data.task import Task, build_task
from peft_dps.compare.settings import Settings

_MERGED = (0, 1, 1)  # neutral and contradiction are both no entailment
_COLUMNS = ("premise", "hypothesis")
DATA = {
    "rte": glue.DATA["rte"],
    "mnli": glue.DATA["mnli"],
    # A label of -1 means that the annotators did not agree; such pairs are not part of the task.
    "snli": Published("snli", "stanfordnlp/snli", _COLUMNS, ENTAILMENT, without_label=True, tests=("test",)),
    # The data set was published as a script; the Hub's own conversion needs none.
    "sick": Published(
        *("sick", "RobZamp/sick", ("sentence_A", "sentence_B"), ENTAILMENT),
        revision="refs/convert/parquet",
        tests=("test",),
    ),
    "scitail": Published(
        *("scitail", "allenai/scitail", _COLUMNS, ENTAILED_OR_NOT),
        config="tsv_format",
        synonyms={"entails": "entailment", "neutral": "not_entailment"},
        tests=("test",),
    ),
}


def nli_task(name: str, settings: Settings, folder: Path | None = None) -> Task:
    """Train on one of RTE, MNLI, SNLI, SICK and SciTail, test on all five.

    RTE and SciTail know two classes, the others three. Where one is trained on and the other tested on, neutral and
    contradiction count as not entailed: in the test's labels if two were trained on, in the predictions if three were.

    Args:
        name: One of `DATA`.
        settings: Sizes of the splits.
        folder: Local folder with `<name>/<split>.parquet`; None for the Hub.

    Raises:
        DataError: The data cannot be loaded or is not what it should be.
    """
    training = DATA[name].load("train", folder)
    tests: dict[str, Examples] = {}
    merged: dict[str, tuple[int, ...]] = {}
    for domain in (name, *(other for other in DATA if other != name)):
        test = DATA[domain].load(DATA[domain].tests[0], folder)
        if training.label_names == ENTAILED_OR_NOT and test.label_names == ENTAILMENT:
            labels = tuple(_MERGED[int(label)] for label in test.labels)
            test = replace(test, label_names=ENTAILED_OR_NOT, labels=labels)
        elif training.label_names == ENTAILMENT and test.label_names == ENTAILED_OR_NOT:
            merged[domain] = _MERGED
        tests[domain] = test
    return build_task(f"nli/{name}", training, tests, settings, merged=merged)
