from __future__ import annotations

import math

import pytest

from peft_dps.compare.choice import Choice, beyond, choose
from peft_dps.compare.plan import Plan
from peft_dps.compare.run import Evaluation, Run


def tried(rate, score, seed=0, loss=1.0, error=""):
    plan = Plan("full", rate, "mine", seed, "tiny", phase="tune")
    if error:
        return Run(plan, error=error)
    return Run(plan, metrics=["m"], validation={"m": score}, evaluations=[Evaluation(1, 1.0, loss, score)])


@pytest.mark.parametrize(
    ("text", "method", "options"),
    [
        ("full", "full", {}),
        ('dps-dense:{"density": 0.3}', "dps-dense", {"density": 0.3}),
        ("peft:LoraConfig", "peft:LoraConfig", {}),
        (
            'peft:LoraConfig:{"r": 8, "target": ["a:b"]}',
            "peft:LoraConfig",
            {"r": 8, "target": ["a:b"]},
        ),
    ],
)
def test_choices_as_they_are_written(text, method, options):
    choice = Choice.parse(text)
    assert (choice.method, choice.options) == (method, options)


@pytest.mark.parametrize("text", ["lora:r=8", "lora:[8]", "lora:", "peft:LoraConfig:8"])
def test_options_that_are_no_json_object_are_named(text):
    with pytest.raises(ValueError, match="must be a JSON object"):
        Choice.parse(text)


def test_what_was_left_open_is_filled_in():
    choice = Choice("dps-dense", {"density": 0.3}).checked()
    assert (choice.title, choice.is_tuned) == ("DPS Dense (density=0.3)", True)
    assert choice.rates == Choice("full").checked().rates  # as many tries for DPS as for full fine-tuning
    own = Choice("full", title="everything", learning_rates=(1,)).checked()
    assert (own.title, own.rates, own.is_tuned) == ("everything", (1.0,), False)


@pytest.mark.parametrize("rate", [0, -1e-4, math.nan, math.inf, "high"])
def test_learning_rates_that_are_none_are_named(rate):
    with pytest.raises(ValueError, match="`learning_rates` of 'full' must be positive numbers"):
        Choice("full", learning_rates=(rate,)).checked()


def test_the_best_on_validation_is_chosen():
    candidates = choose([1e-3, 1e-4, 1e-5], [tried(1e-3, 0.5), tried(1e-4, 0.7), tried(1e-5, 0.6)])
    assert [(one.learning_rate, one.score, one.chosen) for one in candidates] == [
        (1e-5, 0.6, False),
        (1e-4, 0.7, True),
        (1e-3, 0.5, False),
    ]


def test_seeds_are_averaged():
    runs = [tried(1e-3, 0.9), tried(1e-3, 0.1, seed=1), tried(1e-4, 0.6), tried(1e-4, 0.6, seed=1)]
    low, high = choose([1e-3, 1e-4], runs)
    assert (low.chosen, low.score, high.score) == (True, 0.6, 0.5)
    assert low.seeds == [0, 1]


def test_of_equal_scores_the_least_loss_is_chosen():
    first, second = choose([1e-4, 1e-3], [tried(1e-4, 0.5, loss=0.7), tried(1e-3, 0.5, loss=0.6)])
    assert (first.chosen, second.chosen) == (False, True)
    first, second = choose([1e-4, 1e-3], [tried(1e-4, 0.5, loss=0.7), tried(1e-3, 0.5, loss=math.nan)])
    assert (first.chosen, second.chosen) == (True, False)


def test_a_rate_with_a_failed_run_is_not_chosen():
    runs = [tried(1e-4, 0.1), tried(1e-3, 0, error="RuntimeError: no")]
    first, second = choose([1e-4, 1e-3], runs)
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
    assert beyond(choose(list(scores), [tried(rate, score) for rate, score in scores.items()])) == expected


def test_a_single_rate_is_taken():
    (only,) = choose([1e-4], [])
    assert only.chosen
    assert math.isnan(only.score)
