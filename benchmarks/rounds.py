"""Rounds: each variant takes one step in turn, so that what else the machine does reaches all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.crew import crew_of
from benchmarks.settings import Settings
from benchmarks.worker import StepTimes, Summary, Trainee, set_up
from peft_dps import StageSchedule
from peft_dps.selection.schedule import Position

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
    schedule = StageSchedule(settings.stage_steps)
    with crew_of(Rower, names, settings) as crew:
        threads = max(crew.ask(name, "threads") for name in names)
        rounds = []
        for number in range(1, settings.rounds + 1):
            position = schedule.at(number)
            times = {name: crew.ask(name, "step", position.stage.value) for name in turned(names, number)}
            rounds.append(Round(number, figure_of(position), number <= settings.warmup, times))
            progress(rounds[-1])
        summaries = {name: crew.ask(name, "finish") for name in names}
    return Run(threads, rounds, summaries)


def figure_of(position: Position) -> str:
    """Tell what a step counts for, one of `FIGURES`."""
    selecting = position.stage.value == SUBNETWORK and position.step_in_stage == 1
    return SELECTING if selecting else position.stage.value


def turned(names: Sequence[str], by: int) -> list[str]:
    """Let another variant begin in each round, so that none has a fixed neighbour before it."""
    by %= len(names)
    return [*names[by:], *names[:by]]
