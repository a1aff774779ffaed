"""Rounds: each variant takes one step in turn, so that what else the machine does reaches all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.crew import crew_of
from benchmarks.settings import Settings
from benchmarks.worker import StepTimes, Summary, Trainee, set_up

ACCUMULATE, SELECTING, SUBNETWORK = FIGURES = ("accumulate", "selecting", "subnetwork")


@dataclass(frozen=True)
class Round:
    """One step of every variant.

    Attributes:
        number: Number of the step, from 1.
        figure: What it counts for, one of `FIGURES`: the first step of SUBNETWORK is the one that selects.
        warmup: Whether the figures leave it out.
        times: Per variant, what the step took.
    """

    number: int
    figure: str
    warmup: bool
    times: dict[str, StepTimes]


@dataclass(frozen=True)
class Run:
    """All that was measured.

    Attributes:
        threads: Threads that each variant computed on.
        rounds: The rounds, in order.
        summaries: Per variant, its state at the end.
    """

    threads: int
    rounds: list[Round]
    summaries: dict[str, Summary]


class Rower:
    """A variant in a process of its own, which steps when it is told to.

    Args:
        name: Name of the variant.
        settings: Settings of the run.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        set_up(settings)
        self.trainee = Trainee(name, settings)

    def threads(self) -> int:
        """Return how many threads it computes on."""
        return torch.get_num_threads()

    def step(self, stage: str) -> StepTimes:
        """Train one step in a stage."""
        return self.trainee.step(stage)

    def finish(self) -> Summary:
        """Return what is known at the end."""
        return self.trainee.finish()


def run_rounds(names: Sequence[str], settings: Settings, progress: Callable[[Round], None]) -> Run:
    """Train the variants step by step in turn, each in its own process; while one computes, the others wait.

    Args:
        names: Names of the variants.
        settings: Settings of the run.
        progress: Called with each round when it is done.
    """
    with crew_of(Rower, names, settings) as crew:
        threads = max(crew.ask(name, "threads") for name in names)
        rounds = []
        for number in range(1, settings.rounds + 1):
            stage = stage_of(number, settings.stage_steps)
            times = {name: crew.ask(name, "step", stage) for name in turned(names, number)}
            figure = figure_of(number, settings.stage_steps)
            rounds.append(Round(number, figure, number <= settings.warmup, times))
            progress(rounds[-1])
        summaries = {name: crew.ask(name, "finish") for name in names}
    return Run(threads, rounds, summaries)


def stage_of(number: int, stage_steps: int) -> str:
    """Tell the stage of a step, which DPS is in and the other variants would be."""
    return SUBNETWORK if (number - 1) // stage_steps % 2 else ACCUMULATE


def figure_of(number: int, stage_steps: int) -> str:
    """Tell what a step counts for, one of `FIGURES`."""
    stage = stage_of(number, stage_steps)
    return SELECTING if stage == SUBNETWORK and (number - 1) % stage_steps == 0 else stage


def turned(names: Sequence[str], by: int) -> list[str]:
    """Let another variant begin in each round, so that none has a fixed neighbour before it."""
    by %= len(names)
    return [*names[by:], *names[:by]]
