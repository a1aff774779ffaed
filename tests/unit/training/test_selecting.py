"""What a selection tells of scores that say nothing."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW

from peft_dps import DPSConfig, register_score
from peft_dps.selection.scores import SCORES
from tests.unit.conftest import controller_of, keep_of, train, trainable, weights_of

pytestmark = pytest.mark.device

OPTIMIZERS = {False: lambda parameters: SGD(parameters, lr=0.1), True: lambda parameters: AdamW(parameters, lr=1e-3)}


def train_with(model, optimizer, batches, factors):
    """Make steps with the gradient of each weight multiplied by a factor of its own."""
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for weight, factor in zip(weights_of(model), factors, strict=True):
            weight.grad.mul_(factor)
        optimizer.step()


def told(caplog):
    return [record.getMessage() for record in caplog.records if "all scores of" in record.getMessage()]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_squares_that_all_underflow_are_told_with_the_name_of_the_weight(
    make_model, batches, caplog, variant, scope, lean
):
    model = make_model(variant=variant, scope=scope, lean=lean)
    optimizer = OPTIMIZERS[lean](trainable(model))
    train_with(model, optimizer, batches(3), (1.0, 1e-25))
    (message,) = told(caplog)
    assert "all scores of 'layers.1' are 0 at step 2" in message
    assert "score='absolute_gradient'" in message
    assert "layers.0" not in message
    train_with(model, optimizer, batches(1), (1.0, 1e-25))
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("granularity", ["row", "column", "tensor", "block"])
def test_units_without_scores_are_told(make_model, batches, caplog, granularity):
    model = make_model(granularity=granularity)
    train_with(model, SGD(trainable(model), lr=0.1), batches(3), (1e-25, 1.0))
    (message,) = told(caplog)
    assert "all scores of 'layers.0' are 0 at step 2" in message


def test_a_few_of_many_weights_are_named(make_model, batches, caplog):
    model = make_model(sizes=(12, *[6] * 5, 3))
    train_with(model, SGD(trainable(model), lr=0.1), batches(3), [1e-25] * 6)
    (message,) = told(caplog)
    assert "all scores of 'layers.0', 'layers.1', 'layers.2' and 3 more are 0" in message


@pytest.mark.parametrize("fields", [{}, {"lean": True}, {"score": "random"}, {"density": 1.0}], ids=str)
def test_nothing_is_told_of_scores_that_say_something(make_model, batches, caplog, fields):
    model = make_model(**fields)
    optimizer = OPTIMIZERS["lean" in fields](trainable(model))
    factor = 1e-25 if set(fields) & {"score", "density"} else 1.0
    train_with(model, optimizer, batches(8), (factor, factor))
    assert not told(caplog)


def test_nothing_is_told_of_a_layer_that_is_not_used(make_model, batches, caplog):
    model = make_model()
    optimizer = SGD(weights_of(model)[:1], lr=0.1)
    for x, y in batches(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not told(caplog)


def test_absolute_gradients_say_something_where_squares_do_not(make_model, batches, caplog):
    model = make_model(score="absolute_gradient", stage_steps=1, density=0.25)
    optimizer = SGD(trainable(model), lr=0.0)
    train_with(model, optimizer, batches(1), (1e-25, 1e-25))
    gradient = weights_of(model)[0].grad.abs().flatten()
    train_with(model, optimizer, batches(1), (1e-25, 1e-25))
    best = gradient.argsort(descending=True, stable=True)[: gradient.numel() // 4]
    assert keep_of(controller_of(model).weights[0]).bool().flatten()[best].all()
    assert torch.count_nonzero(gradient) == gradient.numel()
    assert not told(caplog)


@pytest.mark.parametrize("storage", ["copy", "compact"])
@pytest.mark.parametrize(("granularity", "places"), [("tensor", [0, 1, 2]), ("block", [0, 0, 1])])
def test_a_score_is_told_whose_turn_it_may_be(batches, storage, granularity, places):
    seen = []

    @register_score("recorded", evidence="none", per_unit=True)
    def recorded(context):
        seen.append((context.selection, context.place, context.places))
        return torch.ones_like(context.weight, dtype=torch.float32)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 6)), nn.Linear(6, 3))
    fields = {"schedule": "every", "score_steps": 0, "stage_steps": 2, "granularity": granularity, "units": 1}
    config = DPSConfig(target_modules=["0.0", "0.1", "1"], storage=storage, score="recorded", **fields)
    try:
        model = get_peft_model(net, config)
        train(model, SGD(trainable(model), lr=0.1), batches(5))
    finally:
        SCORES.unregister("recorded")
    assert seen == [(selection, place, max(places) + 1) for selection in (1, 2, 3) for place in places]
