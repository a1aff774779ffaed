"""What a training holds in memory in each stage, by kind, and at most: counted at torch's allocators."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks.crew import crew_of
from benchmarks.live import meter_of
from benchmarks.rounds import figure_of, stage_of
from benchmarks.settings import Settings
from benchmarks.worker import Trainee, set_up

ACTIVATIONS = "activations"
_STAGE_STEPS = 2  # the first step makes the optimizer's state, and the first after a selection is a figure of its own


@dataclass(frozen=True)
class Footprint:
    """Memory of a variant.

    Attributes:
        peak: Most bytes that were alive at a time, from the building of the model to the end.
        peaks: Per figure, the most bytes that were alive in such a step.
        kinds: Per figure, the bytes of what lives from step to step by kind, at the end of such a step with its
            gradients; and of what the forward leaves for the backward pass, "activations".
        process: Most memory of its process, above that before the model was built; of the host, also on CUDA. 0 if
            it was not measured.
    """

    peak: int
    peaks: dict[str, int]
    kinds: dict[str, dict[str, int]]
    process: int = 0


class Accountant:
    """Trains a variant for one cycle and a step, and counts.

    Args:
        name: Name of the variant.
        settings: Settings of the run; stages have two steps nevertheless.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        set_up(settings)
        self.name = name
        self.settings = replace(settings, stage_steps=_STAGE_STEPS)

    def count(self) -> Footprint:
        """Train the variant and return what was counted."""
        peaks: dict[str, int] = {}
        kinds: dict[str, dict[str, int]] = {}
        with meter_of(self.settings.device) as meter:
            trainee = Trainee(self.name, self.settings)
            gc.collect()
            building = meter.peak
            for number in range(1, 2 * _STAGE_STEPS + 2):
                stage, figure = stage_of(number, _STAGE_STEPS), figure_of(number, _STAGE_STEPS)
                meter.reset()
                trainee.optimizer.zero_grad()
                before, kept = meter.live, []
                trainee.step(stage, between=lambda kept=kept: kept.append(meter.live))
                peaks[figure] = max(peaks.get(figure, 0), meter.peak)
                kinds[figure] = {**trainee.tensors[stage], ACTIVATIONS: kept[0] - before}
        return Footprint(max(building, *peaks.values()), peaks, kinds, trainee.finish().peak_above)


def count_footprints(names: Sequence[str], settings: Settings) -> dict[str, Footprint]:
    """Count the memory of variants, one after the other, each in a process of its own.

    Args:
        names: Names of the variants.
        settings: Settings of the run.
    """
    found = {}
    for name in names:
        with usual_malloc(), crew_of(Accountant, [name], settings) as crew:
            found[name] = crew.ask(name, "count")
    return found


@contextmanager
def usual_malloc() -> Iterator[None]:
    """Let processes begin without settings of malloc: one that keeps freed memory for speed blurs their peaks."""
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MALLOC_")}
    try:
        yield
    finally:
        os.environ.update(settings)
