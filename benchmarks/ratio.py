"""Ratios between variants: of step times in the same round, and of peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.rounds import ACCUMULATE, FIGURES, SELECTING, SUBNETWORK, Run
from benchmarks.variant import COMPARISONS, DENSE, LEAN_DENSE, LEAN_MIX, MIX, NARROW_DENSE, VARIANTS
from benchmarks.worker import StepTimes

MEMORY, LOADING = "memory", "loading"
_DENSE = {ACCUMULATE: 1.02, SELECTING: 1.3, SUBNETWORK: 1.02, MEMORY: 1.30, LOADING: 1.05}
_MIX = {ACCUMULATE: 1.05, SELECTING: 1.3, SUBNETWORK: 1.05, MEMORY: 1.45, LOADING: 1.05}
# What medians beside full fine-tuning should not exceed.
TARGETS: dict[str, dict[str, float]] = {
    DENSE: _DENSE,
    MIX: _MIX,
    NARROW_DENSE: _DENSE,
    LEAN_DENSE: {**_DENSE, MEMORY: 1.03},
    LEAN_MIX: {**_MIX, MEMORY: 1.15},
}


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
        target: What the median should not exceed; None where nothing is aimed at.
        step: Step time over the other's step time in the same round.
        own: 1 + the optimizer step's extra time over the other's step time. Forward and backward, the same work in
            both and the larger part of the noise, cancel out.
        cpu: Processor time over the other's processor time in the same round.
    """

    variant: str
    against: str
    figure: str
    target: float | None
    step: Spread
    own: Spread
    cpu: Spread


def target(variant: str, figure: str) -> float | None:
    """Return what the median of a variant's ratio should not exceed; None where nothing is aimed at.

    Args:
        variant: Name of the variant; of one that is made for a purpose of its own, only whether it is Mix counts.
        figure: One of `FIGURES`, `MEMORY` or `LOADING`.
    """
    known = VARIANTS.get(variant)
    method = (MIX if "mix" in variant else DENSE) if known is None else known.method
    return None if method is None else TARGETS[method][figure]


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


def _of(run: Run, comparisons: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair in comparisons if set(pair) <= set(run.summaries)]
