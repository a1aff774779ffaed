"""Steps that are none of an adapter's own leave its clock, its scores and its masks alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.resuming import assert_same
from tests.unit.conftest import train, trainable, weights_of

pytestmark = pytest.mark.device

VARIANTS = pytest.mark.parametrize("variant", ["dense", "mix"])
STAGES = pytest.mark.parametrize("steps", [1, 3], ids=["accumulate", "subnetwork"])


def state_of(model):
    state = copy.deepcopy(model.dps_state_dict())
    return state["header"], {**state["tensors"], **{k: v.clone() for k, v in model.state_dict().items()}}


def assert_unchanged(model, before):
    after = state_of(model)
    assert after[0] == before[0]
    assert_same(after[1], before[1])


@VARIANTS
@STAGES
@pytest.mark.parametrize("fresh", [True, False], ids=["new optimizer", "used optimizer"])
def test_optimizer_state_for_a_checkpoint(make_model, batches, variant, steps, fresh):
    model = make_model(variant=variant)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(steps))
    optimizer.zero_grad()
    before = state_of(model)
    if fresh:
        optimizer = AdamW(trainable(model), lr=1e-2)
    saved = get_optimizer_state_dict(model, optimizer)
    assert_unchanged(model, before)
    set_optimizer_state_dict(model, AdamW(trainable(model), lr=1e-2), saved)
    assert_unchanged(model, before)


@VARIANTS
@STAGES
def test_a_second_model(make_model, make_net, batches, variant, steps):
    model, other, plain = make_model(variant=variant), make_model(1, variant=variant), make_net(2)
    train(model, SGD(trainable(model), lr=0.1), batches(steps))
    before = state_of(model)
    train(other, SGD(trainable(other), lr=0.1), batches(4))
    train(plain, SGD(plain.parameters(), lr=0.1), batches(4))
    assert_unchanged(model, before)
    assert other.dps_status().steps == 4


@VARIANTS
def test_a_moving_average(make_model, batches, variant):
    model, alone = make_model(variant=variant), make_model(variant=variant)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizers = [SGD(trainable(each), lr=0.1) for each in (model, alone)]
    for batch in batches(7):
        train(model, optimizers[0], [batch])
        train(alone, optimizers[1], [batch])
        average.update_parameters(model)
        with torch.no_grad():
            average(batch[0])
    assert average.module.dps_status().steps == 0
    assert not torch.equal(weights_of(average.module)[0], weights_of(model)[0])
    assert_unchanged(model, state_of(alone))


@VARIANTS
def test_a_moving_average_that_begins_in_subnetwork(make_model, batches, variant):
    model, alone = make_model(variant=variant), make_model(variant=variant)
    optimizers = [SGD(trainable(each), lr=0.1) for each in (model, alone)]
    for each, optimizer in zip((model, alone), optimizers, strict=True):
        train(each, optimizer, batches(3))
    average = AveragedModel(model)
    for batch in batches(4, seed=2):
        train(model, optimizers[0], [batch])
        train(alone, optimizers[1], [batch])
        average.update_parameters(model)
        average.eval()(batch[0]).sum().backward()
    assert average.module.dps_status().steps == 3
    assert_unchanged(model, state_of(alone))


@VARIANTS
def test_a_frozen_reference_model(make_model, batches, variant):
    policy = make_model(variant=variant)
    reference = copy.deepcopy(policy).requires_grad_(False)
    before = state_of(reference)
    # Careless, but harmless: the optimizer has the reference's parameters too.
    optimizer = AdamW([*policy.parameters(), *reference.parameters()], lr=1e-2, weight_decay=0.1)
    for x, y in batches(5):
        with torch.no_grad():
            target = reference(x)
        loss = nn.functional.cross_entropy(policy(x) - target, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.dps_status().steps == 5
    assert_unchanged(reference, before)


@VARIANTS
def test_a_frozen_reference_adapter_in_the_same_model(make_model, batches, variant):
    model = make_model(variant=variant)
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = [weight.detach().clone() for weight in weights_of(model, "reference")]
    for x, y in batches(5):
        model.set_adapter("reference")
        with torch.no_grad():
            target = model(x)
        model.set_adapter("default")
        loss = nn.functional.cross_entropy(model(x) - target, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.dps_status("default").steps == 5
    assert model.dps_status("reference").steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model, "reference"), strict=True))
