"""The demo: a comparison on a small pretrained model that takes some minutes on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

from peft_dps.compare.data.tasks import Place
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.runs.comparison import EMBEDDED, Comparison
from peft_dps.compare.settings import Settings

# One rate each, from the middle of the method's grid: choosing would take longer than all the rest. The best entries
# are sought over the whole model, so that the report can show which layers they fall on. 5% of its
# 114 steps are too few for a stage.
_DPS: dict[str, Any] = {"scope": "model", "stage_steps": 0.1}
METHODS = (
    Choice("full", learning_rates=(1e-4,)),
    Choice("lora", learning_rates=(1e-3,)),
    Choice("bitfit", learning_rates=(3e-3,)),
    Choice("dps-dense", _DPS, (1e-4,), "DPS Dense"),
    Choice("dps-mix", _DPS, (1e-4,), "DPS Mix"),
)
TRAIN_SIZE = 600


def demo_comparison(options: argparse.Namespace, data: OwnData | None) -> Comparison:
    """Return the comparison that the demo is.

    Args:
        options: The flags of `demo`.
        data: The user's own data; None for the embedded corpora.
    """
    rate = options.learning_rate
    methods = METHODS if rate is None else [Choice(m.method, m.options, (rate,), m.title) for m in METHODS]
    budget = {"max_length": 64, "validation_size": 100, "test_size": options.test_size, "evaluations": 5}
    return Comparison(
        output=options.output / "runs.jsonl",
        methods=methods,
        tasks=() if data else ("sentiment",),
        own=(data,) if data else (),
        model=options.model or EMBEDDED,
        train_sizes=(options.train_size or (None if data else TRAIN_SIZE),),
        seeds=(options.seed,),
        settings=Settings(epochs=options.epochs, **budget),
        place=Place(cache=options.cache),
    )
