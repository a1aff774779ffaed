"""Weights of compact layers that a module reads: made only if something is computed with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_dps import DPSConfig
from peft_dps.masking.compact.delta import Delta, EntryDelta

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["column", "row", "entry"])
def layer(request):
    torch.manual_seed(0)
    config = DPSConfig(
        target_modules=["0"], storage="compact", granularity=request.param, schedule="once", score_steps=0,
        density=0.3, train_bias=False,
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    model.score([X], lambda model, x: model(x).square().mean())
    with torch.no_grad():
        model.base_model.model[0].dps_delta["default"].weight.normal_()
    return model.base_model.model[0]


@pytest.fixture
def made(monkeypatch):
    calls = []
    for kind in (Delta, EntryDelta):
        original = kind.dense
        monkeypatch.setattr(kind, "dense", lambda self, base, call=original: calls.append(1) or call(self, base))
    return calls


def expected_of(layer) -> torch.Tensor:
    return layer.get_base_layer().weight + layer.get_delta_weight("default")


@pytest.mark.parametrize("grad", [True, False])
def test_its_form_costs_nothing(layer, made, grad):
    with torch.set_grad_enabled(grad):
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        assert (weight.dtype, weight.device.type, weight.shape, weight.dim()) == (torch.float32, "cpu", (6, 8), 2)
        assert (weight.size(0), weight.numel(), weight.is_floating_point()) == (6, 48, True)
        assert weight.requires_grad is grad
        assert weight.untyped_storage().nbytes() in (0, 6 * 8 * 4)
    assert len(made) <= 1  # asking for the storage is more than its form


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


USES = {
    "linear": F.linear,
    "operator": lambda x, weight: x @ weight.t(),
    "slices": lambda x, weight: torch.cat([F.linear(x, weight[:2]), F.linear(x, weight[2:])], 1),
    "a function of a user": Product.apply,
    "in place": lambda x, weight: F.linear(x, weight.mul_(1.0)),
    "many": lambda x, weight: F.linear(x, torch.stack([weight, weight]).mean(0)),
}


@pytest.mark.parametrize("use", USES)
def test_it_computes_and_trains_as_the_weight(layer, made, use):
    trained, expected = layer.dps_delta["default"].weight, expected_of(layer)
    made.clear()
    weight = layer.weight
    x = X.clone().requires_grad_()
    found = torch.autograd.grad(USES[use](x, weight).square().sum(), [x, trained])
    wanted = torch.autograd.grad(F.linear(x, expected).square().sum(), [x, trained])
    assert len(made) == 2  # in the forward and in the backward pass
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(copy.deepcopy(layer.weight.detach()), expected)


def test_a_forward_of_t5_makes_no_weight(made):
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config), DPSConfig.compact(units=2, score_steps=1))
    tokens = torch.arange(1, 9).view(2, 4)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert model.dps_status().engaged
    made.clear()
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.eval().generate(input_ids=tokens, max_new_tokens=3)
    assert not made
