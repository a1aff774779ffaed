"""Child-Tuning_F beside a plain loop: the gradient of the chosen entries, divided by their share, to the optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from peft_dps import recipes
from peft_dps.errors import ConfigError
from tests.step_by_step import (
    OPTIMIZERS,
    TARGETS,
    Ours,
    compare,
    loss_of,
    make_batches,
    make_net,
    micro_batches,
    same,
)
from tests.unit.conftest import controller_of

pytestmark = pytest.mark.device

DENSITY = 0.3


def config(**fields):
    return recipes.child_tuning_f(target_modules=TARGETS, density=DENSITY, **fields)


class Reference:
    """Plain training whose gradients are masked and scaled before the step."""

    def __init__(self, optimizer: str) -> None:
        self.net = make_net()
        self.optimizer = OPTIMIZERS[optimizer](list(self.net.parameters()))

    def step(self, batch, masks, micro: int = 1) -> None:
        for part in micro_batches(batch, micro):
            (loss_of(self.net, part) / micro).backward()
        for layer, mask in zip(self.net.layers, masks, strict=True):
            entries = layer.weight.numel()
            for index in range(entries):
                chosen = bool(mask.view(-1)[index])
                layer.weight.grad.view(-1)[index] *= entries / math.ceil(entries * DENSITY) if chosen else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def values(self):
        return [layer.weight for layer in self.net.layers], [layer.bias for layer in self.net.layers]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_follows_the_reference(optimizer, micro):
    ours, reference = Ours(config, optimizer), Reference(optimizer)
    for step, batch in enumerate(make_batches(8)):
        if step == 4:
            resumed = ours.resumed()
        ours.step(batch, micro)
        reference.step(batch, ours.masks, micro)
        compare(ours, *reference.values)
        if step >= 4:
            resumed.step(batch, micro)
            assert same(resumed, ours)
    assert ours.model.dps_status().steps == 8


def test_each_step_and_weight_has_a_mask_of_its_own_of_the_same_size():
    ours, seen = Ours(config), []
    for batch in make_batches(60):
        ours.step(batch)
        seen.append([mask.clone() for mask in ours.masks])
    for masks in zip(*seen, strict=True):
        times = torch.stack(masks).double()
        assert set(times.flatten(1).sum(1).tolist()) == {math.ceil(masks[0].numel() * DENSITY)}
        assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
        share = times.flatten(1).mean(1)[0]
        # Each entry takes part in a share of the 60 steps, but for what 5 standard errors allow.
        assert (times.mean(0) - share).abs().max() < 5 * math.sqrt(share * (1 - share) / 60)


def test_momentum_and_decay_move_entries_without_a_gradient():
    ours = Ours(config)
    batches = make_batches(2)
    ours.step(batches[0])
    before = [weight.weight.clone() for weight in controller_of(ours.model).weights]
    ours.step(batches[1])
    for weight, values, mask in zip(controller_of(ours.model).weights, before, ours.masks, strict=True):
        assert (weight.weight != values)[~mask].all()
    assert ours.model.dps_status().frozen_moved


def test_no_evidence_is_gathered_and_a_score_of_gradients_is_refused():
    ours = Ours(config)
    ours.step(make_batches(1)[0])
    assert all(weight.gathered.is_empty for weight in controller_of(ours.model).weights)
    with pytest.raises(ConfigError, match=r"`schedule='every'` with `score_steps=0` .* `evidence` is 'squared_gradie"):
        config(score="squared_gradient")
    with pytest.raises(ConfigError, match=r"`evidence` is 'absolute_gradient', which looks.*Use a larger"):
        config(evidence="absolute_gradient")


def test_over_the_model_the_gradient_of_each_weight_is_divided_by_its_own_share():
    ours = Ours(lambda: config(scope="model", seed=2), "sgd")
    batch = make_batches(1)[0]
    ours.backward(batch)
    before = [weight.gradient.clone() for weight in controller_of(ours.model).weights]
    ours.optimizer.step()
    shares = [mask.double().mean() for mask in ours.masks]
    assert len(set(map(float, shares))) == 3
    for weight, gradient, mask, share in zip(
        controller_of(ours.model).weights, before, ours.masks, shares, strict=True
    ):
        torch.testing.assert_close(weight.gradient, gradient * mask / share, rtol=1e-14, atol=0)
