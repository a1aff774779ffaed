from __future__ import annotations

import math

import pytest

from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.scores import method_scores, overall_scores
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Run


def experiment(scores, task="cola"):
    """Scores per method and seed; None for a failed run."""
    methods = []
    for variant, seeds in scores.items():
        runs = {}
        for seed, score in seeds.items():
            plan = Plan(variant, 1e-4, task, seed, "tiny")
            found = {} if score is None else {"near": {"accuracy": score}}
            runs[seed] = Run(plan, variant, "" if score is not None else "OSError: no", ["accuracy"], found)
        methods.append(MethodRuns(variant, variant, runs))
    seeds = tuple(sorted({seed for own in scores.values() for seed in own}))
    return Experiment(task, task, task, None, "tiny", tuple(methods), seeds, ("near",), ("accuracy",))


def test_method_scores():
    found = method_scores(
        experiment(
            {
                "full": {0: 0.5, 1: 0.6, 2: 0.7},
                "lora": {0: 0.6, 1: 0.7, 2: 0.9},
                "bitfit": {0: 0.4, 1: None, 2: 0.7},
                "late": {2: 0.1},
            }
        ),
        "near",
    )
    full, lora, bitfit, late = found
    assert (full.mean, full.deviation) == pytest.approx((0.6, 0.1))
    assert full.p is full.difference is full.corrected_p is None
    assert (lora.difference, lora.pairs, lora.p) == pytest.approx((0.4 / 3, 3, 2 / 8))
    assert lora.corrected_p == pytest.approx(4 / 8)  # the better of two comparisons
    assert (bitfit.failed, bitfit.values, bitfit.pairs) == (1, [0.4, 0.7], 2)
    assert bitfit.difference == pytest.approx(-0.05)
    assert (late.missing, late.failed, late.deviation, late.interval) == ((0, 1), 0, None, None)
    # By seed: full 2, 2, 2.5; lora 1, 1, 1; bitfit 3, failed and last 3, 2.5; late 4.
    assert [each.rank for each in found] == pytest.approx([6.5 / 3, 1, 8.5 / 3, 4])


def test_a_method_that_always_fails_is_shown_and_ranked_last():
    full, broken = method_scores(experiment({"full": {0: 0.5, 1: 0.5}, "broken": {0: None, 1: None}}), "near")
    assert (broken.failed, broken.values, broken.p, broken.rank) == (2, [], None, 2)
    assert math.isnan(broken.mean)
    assert full.rank == 1


def test_without_the_reference_nothing_is_tested():
    found = method_scores(experiment({"lora": {0: 0.5}, "bitfit": {0: 0.4}}), "near")
    assert [each.p for each in found] == [None, None]
    assert [each.rank for each in found] == [1, 2]


def test_overall_pools_pairs_and_tasks_weigh_alike():
    one = experiment({"full": {0: 0.5, 1: 0.5}, "lora": {0: 0.6, 1: 0.6}}, "one")
    two = experiment(
        {"full": dict.fromkeys(range(4), 0.5), "lora": dict.fromkeys(range(4), 0.4), "bitfit": {0: 0.3, 1: None}},
        "two",
    )
    full, lora, bitfit = overall_scores([one, two])
    assert (full.experiments, full.p, full.finished) == (2, None, 6)
    assert (lora.pairs, lora.better, lora.finished) == (6, 1, 6)
    assert lora.difference == pytest.approx(0)  # +0.1 in one task, -0.1 in the other
    assert lora.p == 1
    assert (bitfit.experiments, bitfit.failed, bitfit.pairs) == (1, 1, 1)
    assert lora.rank == pytest.approx((1 + 2) / 2)
    assert full.rank == pytest.approx((2 + 1) / 2)


def test_overall_reaches_what_one_task_cannot():
    tasks = [
        experiment({"full": dict.fromkeys(range(3), 0.5), "lora": dict.fromkeys(range(3), 0.6)}, name)
        for name in "abc"
    ]
    assert method_scores(tasks[0], "near")[1].p == 2 / 2**3
    assert overall_scores(tasks)[1].p == 2 / 2**9


def test_overall_leaves_out_tasks_without_scores():
    empty = Experiment("none", "none", "none", None, "tiny", (), (), (), ())
    assert overall_scores([empty]) == []
