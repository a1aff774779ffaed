"""Optimizers that are given a closure: the gradients that DPS takes part in come into being inside the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from peft_dps.errors import EngineError
from tests.unit.conftest import controller_of, train, trainable, weights_of

pytestmark = pytest.mark.device


def backward(model, batch):
    x, y = batch
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("as_keyword", [False, True])
def test_closures_give_the_same_training_as_plain_steps(make_model, batches, as_keyword):
    plain, closed = make_model(), make_model()
    first, second = (AdamW(trainable(model), lr=1e-2) for model in (plain, closed))
    train(plain, first, batches(6))
    for batch in batches(6):

        def closure(batch=batch):
            second.zero_grad()
            return backward(closed, batch)

        loss = second.step(closure=closure) if as_keyword else second.step(closure)
        assert loss.item() > 0
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(closed), strict=True))
    assert plain.dps_status() == closed.dps_status()


def test_a_closure_without_gradients_is_no_step(make_model):
    model = make_model()
    AdamW(trainable(model)).step(lambda: torch.zeros(()))
    assert controller_of(model).clock.step == 0


def test_a_closure_evaluated_twice_is_refused_while_scoring(make_model, batches):
    class Twice(SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    model = make_model()
    with pytest.raises(EngineError, match="2 times"):
        Twice(trainable(model), lr=0.1).step(lambda: backward(model, batches(1)[0]))


@pytest.mark.refuses("Training", "LBFGS", "it evaluates the gradient several times in one step")
def test_lbfgs_is_refused_with_the_reason(make_model, batches):
    model = make_model()
    with pytest.raises(EngineError, match="LBFGS evaluates the gradient several times"):
        torch.optim.LBFGS(trainable(model)).step(lambda: backward(model, batches(1)[0]))


class Deaf(AdamW):
    """Takes a closure, and does not call it."""

    def step(self, closure=None):
        return super().step()


def test_a_closure_that_nobody_calls_is_an_error(make_model, batches):
    model = make_model()
    optimizer = Deaf(trainable(model), lr=1e-2)
    loss = backward(model, batches(1)[0])
    with pytest.raises(EngineError, match=r"Deaf was given a closure and did not call it"):
        optimizer.step(lambda: loss)
    optimizer.zero_grad()
    optimizer.step(lambda: loss)  # without gradients it changes nothing
    train(model, optimizer, batches(4))
    assert model.dps_status().steps == 4


def test_a_closure_that_raises_keeps_its_error(make_model, batches):
    model = make_model()
    optimizer = AdamW(trainable(model), lr=1e-2)
    backward(model, batches(1)[0])

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    optimizer.zero_grad()
    train(model, optimizer, batches(2))
    assert model.dps_status().steps == 2


class Scaled(SGD):
    """Takes something else than a closure."""

    def step(self, factor=1.0):
        for group in self.param_groups:
            group["lr"] = 0.1 * float(factor)
        return super().step()


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)])
def test_what_is_no_closure_is_passed_on(make_model, batches, factor):
    model, plain = make_model(), make_model()
    optimizer, reference = Scaled(trainable(model)), SGD(trainable(plain), lr=0.05)
    for batch in batches(6):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step(factor)
    train(plain, reference, batches(6))
    assert model.dps_status() == plain.dps_status()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(model), strict=True))
