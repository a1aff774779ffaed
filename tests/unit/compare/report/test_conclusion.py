from __future__ import annotations

import pytest

from peft_dps.compare.report.conclusion import conclusion
from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Run, Timing

SCORES = {"full": 0.5, "lora": 0.49, "bitfit": 0.4}
MEMORY = {"full": 1000, "lora": 500, "bitfit": 250}


def experiments(seeds, scores=SCORES, tasks=("cola",), memory=MEMORY, domains=("here",), timings=()):
    runs = {}
    for task in tasks:
        for method, score in scores.items():
            for seed in range(seeds):
                found = {domain: {"m": score + 0.001 * (seed % 2)} for domain in domains}
                run = Run(
                    Plan(method, 1e-4, task, seed, "tiny"), method, "", ["m"], found, peak_memory=memory.get(method, 0)
                )
                runs[run.plan.key] = run
    return experiments_of(Results(runs, list(timings)))


def test_of_several_tasks_with_one_seed_each_the_pairs_are_tested():
    assert conclusion(experiments(1, tasks=("a", "b"))).startswith("Over 2 tasks, no method differs")


def test_too_few_seeds_are_named_with_how_many_it_takes():
    said = "No method differs from full beyond chance, which 3 pairs of runs could not show: it takes 7; "
    assert conclusion(experiments(3)).startswith(said)


def test_what_differs_is_named_with_its_difference():
    assert conclusion(experiments(8)).startswith(
        "Beyond chance, lora (-1.0), bitfit (-10.0) differ from full; the che"
    )
    assert conclusion(experiments(8, {"full": 0.5, "lora": 0.4})) == (
        "Beyond chance, lora (-10.0) differs from full; none comes within 2 points of it."
    )


def test_several_tasks_are_put_together():
    timings = [Timing("tiny", task, 16, 8, {"full": [2.0], "lora": [1.0]}) for task in "ab"]
    said = conclusion(experiments(4, {"full": 0.5, "lora": 0.5}, tasks=("a", "b"), timings=timings))
    assert said == (
        "Over 2 tasks, no method differs from full beyond chance; the cheapest in memory within 2 points is lora "
        "(0.50 of the memory, 0.50 of the step time)."
    )


def test_methods_that_take_about_as_little_memory_are_named_together():
    memory = {"full": 100, "lora": 52, "dps": 50, "bitfit": 60}
    said = conclusion(experiments(4, dict.fromkeys(memory, 0.5), memory=memory))
    assert "the cheapest in memory within 2 points are lora (0.52 of the memory) and dps (0.50 of the memory)" in said


def test_the_domain_is_named_where_there_are_several():
    assert conclusion(experiments(2, domains=("here", "there"))).startswith("On here, no method differs")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"memory": {}}, "it takes 7."),
        ({"scores": {"lora": 0.5}}, "Nothing was compared with lora."),
        ({"memory": {"full": 1, "lora": 2, "bitfit": 3}}, "none within 2 points of full takes less memory."),
    ],
)
def test_what_is_not_known_is_not_said(fields, said):
    assert conclusion(experiments(2, **fields)).endswith(said)
