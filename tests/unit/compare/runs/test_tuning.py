from __future__ import annotations

import math

import pytest

from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Evaluation, Run
from peft_dps.compare.runs.tuning import beyond, choose


def tried(rate, score, seed=0, loss=1.0, error=""):
    plan = Plan("full", rate, "mine", seed, "tiny", phase="tune")
    if error:
        return Run(plan, error=error)
    return Run(plan, metrics=["m"], validation={"m": score}, evaluations=[Evaluation(1, loss, score)])


def test_the_best_on_validation_is_chosen():
    candidates = choose([tried(1e-3, 0.5), tried(1e-4, 0.7), tried(1e-5, 0.6)])
    assert [(one.learning_rate, one.score, one.chosen) for one in candidates] == [
        (1e-5, 0.6, False),
        (1e-4, 0.7, True),
        (1e-3, 0.5, False),
    ]


def test_seeds_are_averaged():
    runs = [tried(1e-3, 0.9), tried(1e-3, 0.1, seed=1), tried(1e-4, 0.6), tried(1e-4, 0.6, seed=1)]
    low, high = choose(runs)
    assert (low.chosen, low.score, high.score) == (True, 0.6, 0.5)
    assert low.seeds == [0, 1]


def test_of_equal_scores_the_least_loss_is_chosen():
    first, second = choose([tried(1e-4, 0.5, loss=0.7), tried(1e-3, 0.5, loss=0.6)])
    assert (first.chosen, second.chosen) == (False, True)
    first, second = choose([tried(1e-4, 0.5, loss=0.7), tried(1e-3, 0.5, loss=math.nan)])
    assert (first.chosen, second.chosen) == (True, False)


def test_a_rate_with_a_failed_run_is_not_chosen():
    runs = [tried(1e-4, 0.1), tried(1e-3, 0, error="RuntimeError: no")]
    first, second = choose(runs)
    assert (first.chosen, second.chosen) == (True, False)
    assert math.isnan(second.score)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7}, 1e-2),
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7, 1e-2: 0.8}, 3e-2),
        ({3e-4: 0.7, 1e-3: 0.6, 3e-3: 0.5}, 1e-4),
        ({3e-5: 0.7, 1e-4: 0.6, 3e-4: 0.5}, 1e-5),
        ({1e-5: 0.8, 3e-5: 0.7, 1e-4: 0.6, 3e-4: 0.5}, 3e-6),
        ({3e-5: 0.5, 1e-4: 0.6, 3e-4: 0.5}, None),
        ({1e-4: 0.5, 2e-4: 0.6}, 4e-4),
        ({1e-4: math.nan, 2e-4: math.nan}, None),
    ],
)
def test_what_to_try_beyond_the_best(scores, expected):
    assert beyond(choose([tried(rate, score) for rate, score in scores.items()])) == expected
