"""How long a run will take, from measured step times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Timing

_FORWARD = 1 / 3
"""Of the time of a step: the backward pass takes about twice that of the forward pass."""


def forecast(plan: Plan, sizes: Mapping[str, int], timing: Timing) -> float:
    """Return about how many seconds a run will take: loading, training and evaluation.

    Args:
        plan: The run.
        sizes: Number of examples by split, as in `Task.sizes`.
        timing: Step times that fit the plan, its method's among them.
    """
    settings = plan.settings
    looks = 1 if plan.phase == "tune" else settings.evaluations
    evaluated = looks * sizes["validation"]
    if plan.phase == "test":
        evaluated += sum(size for split, size in sizes.items() if "/" in split)  # tests and probes
    steps = math.ceil(settings.epochs * math.ceil(sizes["train"] / settings.batch_size))
    step = statistics.median(timing.seconds[plan.variant])
    return timing.loading + step * (steps + _FORWARD * evaluated / timing.batch_size)
