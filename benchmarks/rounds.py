"""Rounds: each variant takes one step in turn, so that what else the machine does reaches all of them alike."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.settings import Settings
from benchmarks.worker import FINISH, STEP, StepTimes, Summary, work
from peft_dps import StageSchedule
from peft_dps.schedule import Position

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


def run_rounds(names: Sequence[str], settings: Settings, progress: Callable[[Round], None]) -> Run:
    """Train the variants step by step in turn, each in its own process; while one computes, the others wait.

    Args:
        names: Names of the variants.
        settings: Settings of the run.
        progress: Called with each round when it is done.
    """
    context = multiprocessing.get_context("spawn")
    schedule = StageSchedule(settings.stage_steps)
    with ExitStack() as stack:
        connections: dict[str, Connection] = {}
        for name in names:
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, name, settings), name=name, daemon=True)
            process.start()
            there.close()  # so that a worker that dies ends the connection
            stack.callback(process.join)
            stack.callback(here.close)
            connections[name] = here
        threads = max(connection.recv() for connection in connections.values())
        rounds = []
        for number in range(1, settings.rounds + 1):
            position = schedule.at(number)
            times = {}
            for name in turned(names, number):
                connections[name].send((STEP, position.stage.value))
                times[name] = connections[name].recv()
            rounds.append(Round(number, figure_of(position), number <= settings.warmup, times))
            progress(rounds[-1])
        summaries = {}
        for name, connection in connections.items():
            connection.send((FINISH, ""))
            summaries[name] = connection.recv()
    return Run(threads, rounds, summaries)


def figure_of(position: Position) -> str:
    """Tell what a step counts for, one of `FIGURES`."""
    selecting = position.stage.value == SUBNETWORK and position.step_in_stage == 1
    return SELECTING if selecting else position.stage.value


def turned(names: Sequence[str], by: int) -> list[str]:
    """Let another variant begin in each round, so that none has a fixed neighbour before it."""
    by %= len(names)
    return [*names[by:], *names[:by]]
