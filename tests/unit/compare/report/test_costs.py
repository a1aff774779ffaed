from __future__ import annotations

import math

from peft_dps.compare.report.costs import costs_of, step_ratios, timed_against
from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Evaluation, Run, Timing


def run(variant, seed, scores, **fields):
    looks = [Evaluation(step, 0.1, score) for step, score in enumerate(scores, 1)]
    return Run(Plan(variant, 1e-4, "cola", seed, "tiny"), evaluations=looks, **fields)


def experiment(*methods, timing=None):
    return Experiment("cola", "cola", "cola", None, "tiny", methods, (0, 1, 2), ("cola",), ("accuracy",), timing)


def test_steps_to_the_score_of_the_reference_are_paired_by_seed():
    full = MethodRuns("full", "full", {0: run("full", 0, [0.2, 0.5]), 1: run("full", 1, [0.7, 0.6])})
    fast = MethodRuns("lora", "LoRA", {0: run("lora", 0, [0.5, 0.4]), 1: run("lora", 1, [0.5, 0.6])})
    lone = MethodRuns("late", "late", {2: run("late", 2, [0.9, 0.9])})
    slow = MethodRuns("slow", "slow", {0: run("slow", 0, [0.1, 0.5]), 1: run("slow", 1, [0.1, math.nan])})
    costs = costs_of(experiment(full, fast, lone, slow))
    assert [(each.steps_to_reference, each.reached, each.runs) for each in costs] == [
        (1.5, 2, 2),
        (1.5, 2, 2),
        (None, 0, 0),
        (math.inf, 1, 2),
    ]


def test_costs_are_medians_of_the_finished_runs():
    runs = {
        0: run("dps", 0, [], trainable=10, selected=4, peak_memory=3, file_size=1, seconds=5.0),
        1: run("dps", 1, [], trainable=10, selected=6, peak_memory=5, file_size=1, seconds=7.0),
        2: run("dps", 2, [], error="OSError: no", peak_memory=99),
    }
    (costs,) = costs_of(experiment(MethodRuns("dps", "DPS", runs)))
    assert (costs.trainable, costs.selected, costs.peak_memory, costs.seconds) == (10, 5, 4, 6)
    assert costs.steps_to_reference is None


def test_a_method_that_always_failed_has_no_costs():
    failed = MethodRuns("dps", "DPS", {0: run("dps", 0, [], error="OSError: no")})
    (costs,) = costs_of(experiment(failed))
    assert (costs.trainable, costs.seconds, costs.learning_rates) == (None, None, (1e-4,))


def test_step_ratios_are_medians_of_rounds():
    timing = Timing("tiny", "cola", 16, 32, {"lora": [1, 2, 9], "full": [2, 2, 3], "none": []})
    assert timed_against(timing, "full") == "full"
    assert step_ratios(timing, "full") == {"lora": [0.5, 1, 3], "full": [1, 1, 1]}
    full = MethodRuns("full", "full", {0: run("full", 0, [])})
    lora = MethodRuns("lora", "LoRA", {0: run("lora", 0, [])})
    assert [each.step_ratio for each in costs_of(experiment(full, lora, timing=timing))] == [1, 1]


def test_a_step_of_a_method_in_cycles_is_the_mean_of_both_stages():
    timing = Timing("tiny", "cola", 16, 32, {"dps": [2, 2, 8, 3, 3, 3], "full": [2] * 6})
    for schedule, expected in (("cycle", 1.25), ("once", 1.5)):
        dps = MethodRuns("dps", "DPS", {0: run("dps", 0, [], config={"schedule": schedule})})
        full = MethodRuns("full", "full", {0: run("full", 0, [])})
        assert [each.step_ratio for each in costs_of(experiment(full, dps, timing=timing))] == [1, expected]


def test_without_the_reference_the_first_one_is_the_measure():
    timing = Timing("tiny", "cola", 16, 32, {"lora": [2.0], "bitfit": [1.0]})
    assert step_ratios(timing, "full") == {"lora": [1], "bitfit": [0.5]}
    assert step_ratios(Timing("tiny", "cola", 16, 32, {}), "full") == {}
