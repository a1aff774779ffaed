"""The demo: a comparison on a small pretrained model that takes some minutes on a CPU."""

from __future__ import annotations

import argparse

from peft_dps.compare.data.tasks import Place
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.runs.comparison import EMBEDDED, Comparison
from peft_dps.compare.runs.machine import usable_cores
from peft_dps.compare.settings import Settings

# One rate each: choosing would take longer than all the rest, and is what `compare` is for. A stage of Dense has a
# quarter of the steps, two cycles in all. In this order two runs at a time end at about the same time.
METHODS = (
    Choice("full", learning_rates=(1e-4,)),
    Choice("dps-columns", learning_rates=(1e-3,)),
    Choice("random-columns", learning_rates=(3e-3,)),
    Choice("dps-dense", {"stage_steps": 0.25}, (1e-4,), "DPS Dense"),
    Choice("lora", learning_rates=(1e-3,)),
)
TRAIN_SIZE = 256
DEMO = (
    f"{len(METHODS)} methods fine-tune a 22M model on {TRAIN_SIZE} movie reviews.\n"
    "Each is tested on four domains. It takes some minutes on 2 cores.\n"
    "Ctrl-C stops; the same command goes on from there."
)
"""What the demo does and how long it takes, for its first line."""
JOBS = 2  # a process on each of two cores is faster than one on both


def demo_comparison(options: argparse.Namespace, data: OwnData | None) -> Comparison:
    """Return the comparison that the demo is.

    Args:
        options: The flags of `demo`.
        data: The user's own data; None for the embedded corpora.
    """
    rate = options.learning_rate
    methods = METHODS if rate is None else [Choice(m.method, m.options, (rate,), m.title) for m in METHODS]
    is_fetched = data is None or options.model is None
    return Comparison(
        output=options.output / "runs.jsonl",
        methods=methods,
        tasks=() if data else ("sentiment",),
        own=(data,) if data else (),
        probes=("articles",) if is_fetched else (),  # it comes with the embedded corpora
        model=options.model or EMBEDDED,
        train_sizes=(options.train_size or (None if data else TRAIN_SIZE),),
        seeds=(options.seed,),
        settings=Settings(epochs=options.epochs, max_length=64, validation_size=0, test_size=options.test_size),
        jobs=min(JOBS, usable_cores()),
        place=Place(cache=options.cache),
    )
