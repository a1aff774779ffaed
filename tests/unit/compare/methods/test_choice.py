from __future__ import annotations

import math

import pytest

from peft_dps.compare.methods.choice import Choice


@pytest.mark.parametrize(
    ("text", "method", "options"),
    [
        ("full", "full", {}),
        ('dps-dense:{"density": 0.3}', "dps-dense", {"density": 0.3}),
        ("peft:LoraConfig", "peft:LoraConfig", {}),
        ("recipe:paca", "recipe:paca", {}),
        ('recipe:paca:{"units": 4}', "recipe:paca", {"units": 4}),
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
