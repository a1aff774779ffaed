from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dps import DPSConfig
from peft_dps.errors import ConfigError
from peft_dps.selection.schedule import SCHEDULES, Cycle

COLUMNS = {"storage": "compact", "granularity": "column"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**COLUMNS, "units": 4, "density": 0.1}, "`density=0.1` has no effect since `units=4` .* use one of the two"),
        (
            {"granularity": "row", "units": 4, "variant": "mix"},
            "`units=4` leaves no `density`, which noise draws columns with",
        ),
        ({"score_steps": 3}, r"`score_steps=3` has no effect with `schedule='cycle'`.*`schedule='once'` or 'every'"),
        ({"participation_decay": False}, "`participation_decay=False` has no effect without the noise of DPS Mix"),
        ({"reduction": "sum"}, "`reduction='sum'` has no effect with `granularity='entry'`"),
    ],
)
def test_a_value_that_does_nothing_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DPSConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"score_steps": 8},  # the default
        {"schedule": "once", "score_steps": 3},
        {"schedule": "every", "stage_steps": 4, "score_steps": 3},
        {"variant": "mix", "participation_decay": False},
        {"noise": "columns", "participation_decay": False},
        {"granularity": "row", "reduction": "sum"},
        {**COLUMNS, "units": 4},
    ],
)
def test_values_that_do_something_are_taken(fields):
    DPSConfig(**fields)


def test_a_schedule_of_a_user_may_read_any_setting():
    SCHEDULES.register("late")(lambda settings: Cycle(settings.score_steps))
    try:
        assert DPSConfig(schedule="late", score_steps=3).score_steps == 3
    finally:
        SCHEDULES.unregister("late")


def test_presets_and_copies_of_a_configuration_have_no_such_values():
    for config in (DPSConfig.from_paper(), DPSConfig.from_paper("mix"), DPSConfig.compact()):
        assert dataclasses.replace(config) == config


def test_a_saved_adapter_loads_whatever_its_fields(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), DPSConfig(target_modules=["0"]))
    model.peft_config["default"].score_steps = 3  # as a version before may have taken it
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 4)), tmp_path, is_trainable=is_trainable)
        assert loaded.peft_config["default"].score_steps == 3
    with pytest.raises(ConfigError, match="`score_steps=3` has no effect"):
        model.add_adapter("other", loaded.peft_config["default"])


@pytest.mark.parametrize("name", ["granularity", "storage"])
def test_a_compact_adapter_does_not_load_as_something_else(name, tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), DPSConfig.compact(2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text()) | {name: "mine", "score": "mine too"}
    file.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=f"`{name}` must be one of .*, got 'mine'"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 4)), tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("random", 0)),
        ({"score": "random", "score_steps": 3}, ("random", 3)),
        ({"score_steps": 8}, ("squared_gradient", 8)),
        ({"score_steps": 0}, ("squared_gradient", 0)),
        ({"evidence": "absolute_gradient"}, ("squared_gradient", 8)),
        ({"score": "absolute_gradient"}, ("absolute_gradient", 8)),
        ({"schedule": "every", "stage_steps": 4}, ("random", 0)),
    ],
)
def test_units_are_chosen_at_random_unless_scores_are_asked_for(given, expected):
    config = DPSConfig.compact(**given)
    assert (config.score, config.score_steps) == expected


def test_units_are_asked_for_in_one_way():
    assert (DPSConfig.compact().units, DPSConfig.compact(units=None).units, DPSConfig.compact(4).units) == (16, 16, 4)
    assert DPSConfig.compact(density=0.1).units is None
    assert DPSConfig.compact(None, density=0.1).units is None
    with pytest.raises(ConfigError, match=r"`density=0\.1` has no effect since `units=4`"):
        DPSConfig.compact(4, density=0.1)
    with pytest.raises(ConfigError, match=r"compact\(granularity='entry'\)` needs a `density`"):
        DPSConfig.compact(granularity="entry")
