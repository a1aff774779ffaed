"""Modules that read their children's weights instead of calling them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSConfig
from tests.device import DEVICE

pytestmark = pytest.mark.device


def wrap(module, **options):
    return get_peft_model(module, DPSConfig(stage_steps=2, **options))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x):
        return self.encoder(x)


INPUTS = torch.linspace(-1, 1, 48).view(2, 3, 8).to(DEVICE)


def make(kind, **options):
    torch.manual_seed(0)
    if kind == "attention":
        return Attention().to(DEVICE), {"target_modules": ["out_proj"], **options}
    return Encoder().to(DEVICE), {"target_modules": ["linear1", "linear2", "out_proj"], **options}


@pytest.mark.supports(
    "Training", "modules that read weights (`nn.MultiheadAttention.out_proj`, `nn.TransformerEncoder`)"
)
@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_the_active_weight_is_used(kind):
    base, options = make(kind, init_weights=False)
    base.eval()
    with torch.no_grad():  # only then does the encoder layer take its fast path
        plain = base(INPUTS)
        model = wrap(base, **options).eval()
        active = model(INPUTS)
        assert not torch.allclose(active, plain, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(INPUTS), plain)
        model.merge_adapter()
        torch.testing.assert_close(model(INPUTS), active, rtol=1e-5, atol=1e-6)
        with model.disable_adapter():
            torch.testing.assert_close(model(INPUTS), plain, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        torch.testing.assert_close(model.merge_and_unload()(INPUTS), active, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_fast_and_slow_path_agree(kind):
    base, options = make(kind, init_weights=False)
    model = wrap(base, **options).eval()
    slow = model(INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(model(INPUTS), slow.detach(), rtol=1e-5, atol=1e-6)


def test_two_adapters_and_the_weight_that_is_read():
    base, options = make("attention", init_weights=False)
    model = wrap(base, **options)
    model.add_adapter("other", DPSConfig(stage_steps=2, **options))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.attention.out_proj
    expected = layer.dps_weight["default"] + layer.dps_weight["other"] - layer.base_layer.weight
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_what_is_read_is_trained(kind):
    base, options = make(kind, density=0.5)
    model = wrap(base, **options)
    weights = [parameter for name, parameter in model.named_parameters() if "dps_weight" in name]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        (model(INPUTS) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    status = model.dps_status()
    assert (status.steps, status.selected_fraction, status.frozen_moved) == (4, 0.5, False)


def test_the_weight_in_effect_follows_the_state():
    base, options = make("attention", init_weights=False)
    model = wrap(base, **options)
    layer = model.base_model.model.attention.out_proj
    pretrained = layer.base_layer.weight.detach().clone()
    active = layer.dps_weight["default"]
    assert layer.weight is active
    with model.disable_adapter():
        assert torch.equal(layer.weight, pretrained)
        assert torch.equal(layer.bias, layer.base_layer.bias)
    model.merge_adapter()
    assert torch.equal(layer.weight, active)
    assert torch.equal(layer.bias, layer.dps_bias["default"])
    layer.enable_adapters(False)
    assert torch.equal(layer.weight, pretrained)
    assert not torch.equal(layer.bias, layer.dps_bias["default"])
