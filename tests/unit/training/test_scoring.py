"""What steps contribute to scores, and which steps cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from peft_dps import Stage
from peft_dps.errors import EngineError
from tests.device import DEVICE
from tests.unit.conftest import controller_of, keep_of, layers_of, train, trainable, weights_of

pytestmark = pytest.mark.device

VARIANTS = pytest.mark.parametrize("variant", ["dense", "mix"])


def assert_same_training(one, two):
    assert one.dps_status() == two.dps_status()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(two), strict=True))


# --- finite gradients ---


@VARIANTS
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_finite_gradients_are_scored_however_large(make_model, batches, caplog, variant, scope, size):
    model = make_model(variant=variant, scope=scope, density=0.25)
    optimizer = SGD(trainable(model), lr=0.0)
    large = torch.zeros(16, 12, dtype=torch.bool, device=DEVICE)
    large[3:5] = True
    for x, y in batches(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        weights_of(model)[0].grad[large] = size
        optimizer.step()
    assert model.dps_status().unscored_steps == 0
    train(model, optimizer, batches(1))
    assert model.dps_status().stage is Stage.SUBNETWORK
    assert keep_of(controller_of(model).weights[0]).bool()[large].all()
    assert not caplog.text


def test_a_large_gradient_beside_one_that_is_not_finite_is_not_scored(make_model, batches, caplog):
    model = make_model(stage_steps=3)
    optimizer = SGD(trainable(model), lr=0.0)
    train(model, optimizer, batches(1))
    for weight, value in zip(weights_of(model), (1e20, torch.inf), strict=True):
        weight.grad.fill_(value)
    optimizer.step()
    assert (model.dps_status().steps, model.dps_status().unscored_steps) == (2, 1)
    assert "step 2 are not finite" in caplog.text


# --- evidence from the optimizer's second moment ---


OPTIMIZERS = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2),
    "amsgrad": lambda parameters: Adam(parameters, lr=1e-2, amsgrad=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=1e-2),
    "adagrad": lambda parameters: Adagrad(parameters, lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 6], ids=["first cycle", "second cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_state_loaded_into_the_optimizer_while_it_is_scored_is_refused(make_model, batches, make, before, steps):
    model = make_model(lean=True, stage_steps=3)
    optimizer = make(trainable(model))
    train(model, optimizer, batches(before + steps))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights = [weight.detach().clone() for weight in weights_of(model)]
    with pytest.raises(EngineError, match=r"'layers.0' .* the optimizer's state was replaced.*`load_dps_state`"):
        train(model, optimizer, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(model), strict=True))


def test_a_state_that_is_emptied_while_it_is_scored_is_refused(make_model, batches):
    model = make_model(lean=True, stage_steps=3)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(2))
    optimizer.state.clear()
    with pytest.raises(EngineError, match="the optimizer's state was replaced"):
        train(model, optimizer, batches(1))


def test_a_state_may_be_loaded_where_nothing_is_scored(make_model, batches):
    model, left = (make_model(lean=True, stage_steps=2) for _ in range(2))
    optimizers = [AdamW(trainable(each), lr=1e-2) for each in (model, left)]
    for steps, batch in enumerate(batches(9)):
        if steps % 4 == 3:  # in SUBNETWORK
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        train(model, optimizers[0], [batch])
        train(left, optimizers[1], [batch])
    assert_same_training(model, left)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_another_decay_while_it_is_scored_is_refused(make_model, batches, steps):
    model = make_model(lean=True, stage_steps=3)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(steps))
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    with pytest.raises(EngineError, match=r"the optimizer's decay went from 0.999 to 0.95 in the middle of"):
        train(model, optimizer, batches(1))


def test_another_decay_is_fine_where_nothing_is_scored(make_model, batches):
    model = make_model(lean=True, stage_steps=2)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for steps, batch in enumerate(batches(9)):
        if steps % 4 == 3:
            optimizer.param_groups[0]["betas"] = (0.9, 0.95 - 0.01 * steps)
        train(model, optimizer, [batch])
    assert model.dps_status().steps == 9


@VARIANTS
@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 9])
def test_the_states_of_one_moment_go_on_together(make_model, batches, variant, optimizer_first, steps):
    model, resumed = (make_model(lean=True, variant=variant, stage_steps=3) for _ in range(2))
    optimizers = [AdamW(trainable(each), lr=1e-2) for each in (model, resumed)]
    data = batches(13)
    train(model, optimizers[0], data[:steps])
    weights, state = copy.deepcopy((model.state_dict(), model.dps_state_dict()))
    optimizer_state = copy.deepcopy(optimizers[0].state_dict())
    train(resumed, optimizers[1], batches(2, seed=5))  # had begun otherwise
    resumed.load_state_dict(weights)
    if optimizer_first:
        optimizers[1].load_state_dict(optimizer_state)
    resumed.load_dps_state_dict(state)
    if not optimizer_first:
        optimizers[1].load_state_dict(optimizer_state)
    for each, optimizer in zip((model, resumed), optimizers, strict=True):
        train(each, optimizer, data[steps:])
    assert_same_training(model, resumed)


def test_a_layer_that_is_not_used_any_more_is_resumed_with_its_scores(make_model, batches):
    model, resumed = (make_model(lean=True, sizes=(12, 12, 12), stage_steps=3) for _ in range(2))
    optimizers = [AdamW(trainable(each), lr=1e-2) for each in (model, resumed)]

    def step(each, optimizer, layers, x):
        optimizer.zero_grad()
        sum(layer(x).square().mean() for layer in layers_of(each)[:layers]).backward()
        optimizer.step()

    data = [x for x, _ in batches(4)]
    step(model, optimizers[0], 2, data[0])
    resumed.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    resumed.load_dps_state_dict(copy.deepcopy(model.dps_state_dict()))
    for each, optimizer in zip((model, resumed), optimizers, strict=True):
        for x in data[1:]:
            step(each, optimizer, 1, x)
    assert_same_training(model, resumed)
