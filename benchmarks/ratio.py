"""Ratios between variants: of step times in the same round, and of peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.rounds import ACCUMULATE, FIGURES, SELECTING, SUBNETWORK, Run
from benchmarks.variant import COMPARISONS
from benchmarks.worker import StepTimes

MEMORY = "memory"
DENSE_TARGETS = {ACCUMULATE: 1.03, SELECTING: 1.5, SUBNETWORK: 1.03, MEMORY: 1.45}
MIX_TARGETS = {ACCUMULATE: 1.08, SELECTING: 1.5, SUBNETWORK: 1.08, MEMORY: 1.5}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles.

    Attributes:
        median: The median.
        lower: The lower quartile.
        upper: The upper quartile.
        count: Number of values.
    """

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarize values, at least one."""
        lower, median, upper = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(median, lower, upper, len(values))


@dataclass(frozen=True)
class Ratio:
    """How a variant does beside another in one figure.

    Attributes:
        variant: Name of the variant.
        against: Name of the other.
        figure: "accumulate", "selecting" or "subnetwork".
        target: What the median should not exceed.
        step: Step time over the other's step time in the same round.
        own: 1 + the optimizer step's extra time over the other's step time. Forward and backward, the same work in
            both and the larger part of the noise, cancel out.
        cpu: Processor time over the other's processor time in the same round.
    """

    variant: str
    against: str
    figure: str
    target: float
    step: Spread
    own: Spread
    cpu: Spread


@dataclass(frozen=True)
class MemoryRatio:
    """Peak memory of a variant over another's, both above the state before the model was built.

    Attributes:
        variant: Name of the variant.
        against: Name of the other.
        target: What the ratio should not exceed.
        peak: The ratio.
        tensors: The same ratio of the live tensors between steps, at their largest stage: without activations and
            temporary tensors.
    """

    variant: str
    against: str
    target: float
    peak: float
    tensors: float


def target(variant: str, figure: str) -> float:
    """Return what the median of a variant's ratio should not exceed.

    Args:
        variant: Name of the variant.
        figure: One of `FIGURES`, or `MEMORY`.
    """
    return (MIX_TARGETS if "mix" in variant else DENSE_TARGETS)[figure]


def seconds(run: Run, variant: str, figure: str, read: Callable[[StepTimes], float]) -> list[float]:
    """Collect one reading of a variant over the rounds of a figure."""
    return [read(each.times[variant]) for each in run.rounds if each.figure == figure and not each.warmup]


def step_ratios(run: Run, comparisons: Sequence[tuple[str, str]] = COMPARISONS) -> list[Ratio]:
    """Compare step times within rounds, for each comparison whose variants were run."""
    ratios = []
    for variant, against in _of(run, comparisons):
        for figure in FIGURES:
            pairs = [
                (each.times[variant], each.times[against])
                for each in run.rounds
                if each.figure == figure and not each.warmup
            ]
            if not pairs:
                continue
            ratios.append(
                Ratio(
                    variant,
                    against,
                    figure,
                    target(variant, figure),
                    step=Spread.of([ours.seconds / theirs.seconds for ours, theirs in pairs]),
                    own=Spread.of([1 + (ours.update - theirs.update) / theirs.seconds for ours, theirs in pairs]),
                    cpu=Spread.of([ours.cpu / theirs.cpu for ours, theirs in pairs]),
                )
            )
    return ratios


def memory_ratios(run: Run) -> list[MemoryRatio]:
    """Compare peak memory, for each comparison whose variants were run."""
    ratios = []
    for variant, against in _of(run, COMPARISONS):
        ours, theirs = run.summaries[variant], run.summaries[against]
        tensors = [max(sum(kinds.values()) for kinds in each.tensors.values()) for each in (ours, theirs)]
        ratios.append(
            MemoryRatio(
                variant, against, target(variant, MEMORY), ours.peak_above / theirs.peak_above, tensors[0] / tensors[1]
            )
        )
    return ratios


def _of(run: Run, comparisons: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair in comparisons if set(pair) <= set(run.summaries)]
