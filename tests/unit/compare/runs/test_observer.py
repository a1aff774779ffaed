from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from peft_dps.compare.runs import observer as module
from peft_dps.compare.runs.observer import Observer
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Run

PLAN = Plan("dps-dense", 1e-4, "reviews", 0, "tiny", train_size=500)
PLANS = [replace(PLAN, seed=seed) for seed in range(4)]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def finished(plan, **fields):
    return Run(plan, "DPS Dense", metrics=["m"], scores={"here": {"m": 0.625}}, **fields)


def test_without_a_terminal_the_time_is_said_first_and_after_every_run(clock):
    shown = io.StringIO()
    observer = Observer(Console(file=shown, width=80))
    with observer:
        observer.expect(PLANS, PLANS[1:], lambda plan: 200.0)
        clock[0] = 60.0
        observer.finish(finished(PLANS[1]))
        observer.finish(finished(PLANS[2], error="OSError: no"))
        observer.finish(finished(PLANS[3]))
    assert shown.getvalue().rstrip().splitlines() == [
        "4 runs to report; 1 are finished already; about 10 min left.",
        "1/3 DPS Dense, seed 1: 62.5, about 2 min left",
        "2/3 DPS Dense, seed 2: failed: OSError: no",
        "3/3 DPS Dense, seed 3: 62.5",
    ]


def test_what_tells_a_run_from_the_others_is_named(clock):
    shown = io.StringIO()
    observer = Observer(Console(file=shown, width=80))
    plans = [replace(PLAN, phase="tune"), replace(PLAN, task="films"), replace(PLAN, train_size=None)]
    observer.expect(plans, plans, None)
    for plan in plans:
        observer.finish(finished(plan, validation={"m": 0.5}))
    assert shown.getvalue().splitlines() == [
        "2 runs to report, 1 to choose learning rates.",
        "1/3 DPS Dense, reviews, 500 examples, rate 0.0001: 50.0, about 0 s left",
        "2/3 DPS Dense, films, 500 examples, seed 0: 62.5, about 0 s left",
        "3/3 DPS Dense, reviews, all examples, seed 0: 62.5",
    ]


def test_a_line_of_progress_keeps_steps_and_time_at_80_columns(clock):
    shown = io.StringIO()
    observer = Observer(Console(file=shown, width=80, force_terminal=True))
    with observer:
        observer.expect(PLANS, PLANS, lambda plan: 3600.0)
        observer.start(PLANS[0], "DPS Dense (density=0.3, stage_steps=20, granularity=column, storage=compact)")
        observer.step(PLANS[0], 12, 100, "loss 0.45, subnetwork")
        (lines,) = [list(observer._bars.get_renderables())]
        console = Console(file=io.StringIO(), width=80)
        console.print(*lines)
    text = console.file.getvalue()
    assert "0/4, about 4 h left" in text
    assert "12/100 loss 0.45, subnetwork" in text
    assert "DPS Dense (density=0.3" in text
