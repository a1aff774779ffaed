"""What is trained besides the selection is counted, and charged to the budget."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD

from peft_dps import DPSConfig
from peft_dps.errors import ConfigError
from peft_dps.tuner.adapter import find_controller
from tests.unit.conftest import Net, train, trainable

SIZES = (12, 8, 8, 3)  # 96 + 64 + 24 entries, 8 + 8 + 3 biases


def make(**fields):
    torch.manual_seed(0)
    plain = {"target_modules": ["layers.0", "layers.1"], "granularity": "tensor", "stage_steps": 1, "density": 0.5}
    return get_peft_model(Net(SIZES), DPSConfig(**{**plain, **fields}))


@pytest.mark.parametrize("storage", ["copy", "compact"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"train_bias": False}, 0),
        ({}, 16),
        ({"train_remaining": True}, 16 + 27),
        ({"train_bias": False, "modules_to_save": ["layers.2"]}, 27),
    ],
)
def test_biases_and_saved_modules_are_counted(storage, fields, expected):
    model = make(storage=storage, **fields)
    controller = find_controller(model)
    assert controller.besides() == expected
    assert find_controller(copy.deepcopy(model)).besides() == expected
    loaded = pickle.loads(pickle.dumps(model))  # noqa: S301
    del model
    assert find_controller(loaded).besides() == expected


def test_a_parameter_that_saved_modules_share_counts_once():
    net = Net((4, 4, 4, 4))
    net.layers[2].weight = net.layers[1].weight
    config = DPSConfig(target_modules=["layers.0"], granularity="tensor", train_bias=False, train_remaining=True)
    assert find_controller(get_peft_model(net, config)).besides() == 16 + 4 + 4


@pytest.mark.parametrize("storage", ["copy", "compact"])
@pytest.mark.parametrize(
    ("density", "train_bias", "names"),
    [  # of 160 entries, or of 176 of which 16 are biases
        (0.4, False, {"layers.1"}),
        (0.41, False, {"layers.1", "layers.0"}),
        (0.45, True, {"layers.1"}),
        (0.46, True, {"layers.1", "layers.0"}),
    ],
)
def test_biases_are_part_of_the_density(batches, storage, density, train_bias, names):
    fields = {"schedule": "once", "score_steps": 0, "score": "in_turn", "train_bias": train_bias}
    model = make(storage=storage, density=density, target_modules=["layers.1", "layers.0"], **fields)
    find_controller(model).weights.reverse()  # so that the smaller one is the first
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    assert {name for name, layer in model.dps_status().layers.items() if layer.selected} == names


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "row", "scope": "model", "density": 0.1},
        {"scope": "category", "density": 0.1},
        {"units": 1, "density": 0.7},
    ],
)
def test_other_choices_are_as_they_were(batches, fields):
    model = make(modules_to_save=["layers.2"], score="random", schedule="once", score_steps=0, **fields)
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    assert model.dps_status().engaged


def test_a_density_that_is_less_than_what_is_trained_anyway_is_refused(batches):
    model = make(density=0.1, train_remaining=True, score="random", schedule="once", score_steps=0)
    with pytest.raises(ConfigError, match=r"`density=0.1` is 21 of the 203 entries.* 43 are trained besides.*Raise"):
        train(model, SGD(trainable(model), lr=0.1), batches(1))


def test_a_model_that_is_gone_leaves_its_number():
    model = make()
    controller, besides = find_controller(model), find_controller(model).besides()
    layer = model.base_model.model.layers[0]
    del model
    assert isinstance(layer, nn.Module)
    assert controller.besides() == besides
