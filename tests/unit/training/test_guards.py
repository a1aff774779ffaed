"""Weights that change between optimizer steps, and are no alarm: what perturbs them brings them back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.unit.conftest import train, trainable


def perturb_and_restore(model, batch, *, through_data):
    """As adversarial weight perturbation and sharpness-aware minimization do for each micro-batch."""
    x, y = batch
    nn.functional.cross_entropy(model(x), y).backward()
    kept = [parameter.detach().clone() for parameter in trainable(model)]
    with torch.no_grad():
        for parameter in trainable(model):
            target = parameter.data if through_data else parameter
            target.add_(0.05 * parameter.grad / parameter.grad.norm())
    nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for parameter, before in zip(trainable(model), kept, strict=True):
            (parameter.data if through_data else parameter).copy_(before)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_perturbed_forwards_are_no_alarm(make_model, batches, micro_batches, through_data):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    for _ in range(3):
        for batch in batches(micro_batches):
            perturb_and_restore(model, batch, through_data=through_data)
        optimizer.step()
        optimizer.zero_grad()
    assert model.dps_status().steps == 3


def test_averaged_weights_that_are_swapped_in_for_a_look_are_no_alarm(make_model, batches):
    model = make_model()
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    own, averaged = ({name: factor * each for name, each in model.state_dict().items()} for factor in (1.0, 0.9))
    for x, _ in batches(6):
        for state in (averaged, own):
            model.load_state_dict(state)
            model(x)
    assert model.dps_status().steps == 1
