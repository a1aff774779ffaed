"""Mixout beside a plain loop in which autograd differentiates the formula of the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_dps import Stage, recipes
from peft_dps.masking.noise import NOISES
from tests.device import DEVICE
from tests.step_by_step import OPTIMIZERS, SIZES, TARGETS, Ours, compare, make_batches, make_net, micro_batches, same
from tests.unit.conftest import controller_of, layers_of

pytestmark = pytest.mark.device

DENSITY, SEED = 0.4, 3
CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("noise", ["mixout", "mixconnect"])


def config(noise: str = "mixout", **fields):
    return recipes.mixout(**{"target_modules": TARGETS, "density": DENSITY, "seed": SEED, "noise": noise, **fields})


def bits(noise: str, step: int, shapes) -> list[torch.Tensor]:
    """b of a step, in a shape that broadcasts over the weight."""
    if noise == "mixout":
        drawn = NOISES.find(noise)(DENSITY, SEED).draw(step, [s[1] for s in shapes], CPU)
        return [row.double().to(DEVICE) for row in drawn]
    drawn = NOISES.find(noise)(DENSITY, SEED).draw(step, [s.numel() for s in shapes], CPU)
    return [
        each.at(torch.arange(s.numel())).view(s).double().to(DEVICE) for each, s in zip(drawn, shapes, strict=True)
    ]


class Reference:
    """Plain training whose forwards compute with W0 + b * (W - W0) / density."""

    def __init__(self, optimizer: str, noise: str) -> None:
        self.net, self.noise = make_net(), noise
        self.pretrained = copy.deepcopy(self.net)
        self.optimizer = OPTIMIZERS[optimizer](list(self.net.parameters()))
        self.done = 0

    def step(self, batch, micro: int = 1) -> None:
        drawn = bits(self.noise, self.done + 1, [layer.weight.shape for layer in self.net.layers])
        for x, y in micro_batches(batch, micro):
            for index, (layer, base, b) in enumerate(zip(self.net.layers, self.pretrained.layers, drawn, strict=True)):
                effective = base.weight.detach() + b * (layer.weight - base.weight.detach()) / DENSITY
                x = nn.functional.linear(torch.tanh(x) if index else x, effective, layer.bias)
            (nn.functional.cross_entropy(x, y) / micro).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    @property
    def values(self):
        return [layer.weight for layer in self.net.layers], [layer.bias for layer in self.net.layers]


@KINDS
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_follows_the_reference_also_after_a_resume(noise, optimizer, micro):
    ours, reference = Ours(lambda: config(noise), optimizer), Reference(optimizer, noise)
    for step, batch in enumerate(make_batches(8)):
        if step == 4:
            resumed = ours.resumed()
        ours.step(batch, micro)
        reference.step(batch, micro)
        compare(ours, *reference.values)
        if step >= 4:
            resumed.step(batch, micro)
            assert same(ours, resumed)
    status = ours.model.dps_status()
    assert (status.stage, status.selected, status.stage_steps) == (Stage.FULL, None, None)
    assert "training all of 192 entries" in str(status)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_bits(noise, reentrant):
    ours, other = Ours(lambda: config(noise)), Ours(lambda: config(noise))
    for x, y in make_batches(4):
        ours.step((x, y))
        output = checkpoint(other.model, x.clone().requires_grad_(), use_reentrant=reentrant)
        nn.functional.cross_entropy(output, y).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
        assert same(ours, other)


@KINDS
def test_evaluation_computes_with_the_weight_itself(noise):
    ours, data = Ours(lambda: config(noise)), make_batches(3)
    for batch in data:
        ours.step(batch)
    x = data[0][0]
    noisy = ours.model(x)
    ours.model.eval()
    for layer in layers_of(ours.model):
        x = nn.functional.linear(x if layer is layers_of(ours.model)[0] else torch.tanh(x), layer.weight, layer.bias)
    assert torch.equal(ours.model(data[0][0]), x)
    assert not torch.equal(noisy, x)


@KINDS
def test_nothing_of_a_weights_size_is_kept_for_backward_but_the_weight_itself(noise):
    ours = Ours(lambda: config(noise))
    ours.step(make_batches(1)[0])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        ours.model(make_batches(1)[0][0])
    weights = {layer.dps_weight["default"].data_ptr() for layer in layers_of(ours.model)}
    assert {each.data_ptr() for each in kept if tuple(each.shape) in {(9, 12), (7, 9), (3, 7)}} == weights
    for weight in controller_of(ours.model).weights:
        drawn = weight.noise.drawn
        assert (drawn.numel() if noise == "mixout" else 0) < weight.entries


@KINDS
def test_noise_goes_on_while_a_mask_holds(noise):
    def masked():
        return config(noise, schedule="once", score_steps=2)

    ours, data = Ours(masked), make_batches(6)
    for batch in data[:4]:
        ours.step(batch)
    resumed = ours.resumed()
    shapes = [torch.Size(shape) for shape in zip(SIZES[1:], SIZES[:-1], strict=True)]
    drawn = bits(noise, 5, shapes)
    ours.backward(data[4])
    for weight, b, mask in zip(controller_of(ours.model).weights, drawn, ours.masks, strict=True):
        assert ((weight.parameter.grad != 0) <= (b != 0).expand(weight.parameter.shape)).all()
        assert weight.frozen.snapshot is None
        assert mask is not None
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    resumed.step(data[4])
    assert same(ours, resumed)
    assert not ours.model.dps_status().frozen_moved


def test_a_training_without_a_selection_ends_without_a_warning(caplog):
    ours = Ours(config)
    ours.step(make_batches(1)[0])
    controller_of(ours.model).require_selection()
    assert not caplog.text


def test_a_step_without_a_training_forward_is_warned_of_and_has_no_noise(caplog):
    ours = Ours(config)
    ours.model.eval()
    ours.step(make_batches(1)[0])
    assert "without any forward in training mode" in caplog.text
    assert controller_of(ours.model).weights[0].noise.drawn is None
