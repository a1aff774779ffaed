"""Natural language inference out of domain: trained on one data set, tested on all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft_dps.compare import glue
from peft_dps.compare.corpora import Examples
from peft_dps.compare.plan import Settings
from peft_dps.compare.published import ENTAILED_OR_NOT, ENTAILMENT, Published
from peft_dps.compare.task import Task, build_task

MERGED = (0, 1, 1)
"""Neutral and contradiction are both no entailment."""

_DATA = {
    "rte": (glue.published("rte"), "validation"),
    "mnli": (glue.published("mnli"), "validation_matched"),
    "snli": (
        # A label of -1 means that the annotators did not agree; such pairs are not part of the task.
        Published("snli", "stanfordnlp/snli", ("premise", "hypothesis"), ENTAILMENT, without_label=True),
        "test",
    ),
    "sick": (
        # The data set was published as a script; the Hub's own conversion needs none.
        Published("sick", "RobZamp/sick", ("sentence_A", "sentence_B"), ENTAILMENT, revision="refs/convert/parquet"),
        "test",
    ),
    "scitail": (
        Published(
            "scitail",
            "allenai/scitail",
            ("premise", "hypothesis"),
            ENTAILED_OR_NOT,
            config="tsv_format",
            synonyms={"entails": "entailment", "neutral": "not_entailment"},
        ),
        "test",
    ),
}
NAMES = tuple(_DATA)


def nli_task(name: str, settings: Settings, folder: Path | None = None) -> Task:
    """Train on one of RTE, MNLI, SNLI, SICK and SciTail, test on all five.

    RTE and SciTail know two classes, the others three. Where one is trained on and the other tested on, neutral and
    contradiction count as not entailed: in the test's labels if two were trained on, in the predictions if three were.

    Args:
        name: One of `NAMES`.
        settings: Sizes of the splits.
        folder: Local folder with `<name>/<split>.parquet`; None for the Hub.

    Raises:
        DataError: The data cannot be loaded or is not what it should be.
    """
    own, _ = _DATA[name]
    training = own.load("train", folder)
    tests: dict[str, Examples] = {}
    merged: dict[str, tuple[int, ...]] = {}
    for domain in (name, *(other for other in NAMES if other != name)):
        data, split = _DATA[domain]
        test = data.load(split, folder)
        if training.label_names == ENTAILED_OR_NOT and test.label_names == ENTAILMENT:
            test = replace(
                test, label_names=ENTAILED_OR_NOT, labels=tuple(MERGED[int(label)] for label in test.labels)
            )
        elif training.label_names == ENTAILMENT and test.label_names == ENTAILED_OR_NOT:
            merged[domain] = MERGED
        tests[domain] = test
    return build_task(f"nli/{name}", training, tests, settings, merged=merged)
