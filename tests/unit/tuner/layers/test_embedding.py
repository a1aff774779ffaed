from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from peft_dps import DPSConfig, Stage
from peft_dps.errors import TargetError
from peft_dps.masking.effective_weight import AmplifiedWeight, NoisyWeight
from peft_dps.masking.mask import Mask
from peft_dps.masking.noise import ColumnNoise
from tests.device import DEVICE
from tests.reference import ReferenceDense, ReferenceMix
from tests.unit.conftest import trainable

pytestmark = pytest.mark.device

INDICES = torch.tensor([[3, 1, 4, 1], [0, 9, 2, 3]], device=DEVICE)


def wrap(embedding, **fields):
    config = DPSConfig(**{"target_modules": ["0"], "stage_steps": 2, "density": 0.5, **fields})
    return get_peft_model(nn.Sequential(embedding).to(DEVICE), config)


MAKE = {
    "plain": lambda: nn.Embedding(10, 6),
    "padding": lambda: nn.Embedding(10, 6, padding_idx=3),
    "negative padding": lambda: nn.Embedding(10, 6, padding_idx=-1),
    "by frequency": lambda: nn.Embedding(10, 6, padding_idx=3, scale_grad_by_freq=True),
    "gemma": lambda: Gemma3TextScaledWordEmbedding(10, 6, 3, embed_scale=6**0.5),
    "bart": lambda: BartScaledWordEmbedding(10, 6, 3, embed_scale=6**0.5),
}
EVERY = pytest.mark.parametrize("kind", MAKE)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_the_module_itself(kind, dtype):
    embedding = MAKE[kind]().to(dtype)
    model = wrap(embedding)
    layer = model.base_model.model[0]
    assert layer.dps_weight["default"].dtype == torch.float32
    expected, actual = embedding(INDICES), model(INDICES)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    assert torch.equal(model(INDICES.int()), expected)
    embedding.weight.requires_grad_(True)
    direction = torch.randn_like(expected)
    embedding(INDICES).backward(direction)
    actual.backward(direction)
    torch.testing.assert_close(layer.dps_weight["default"].grad.to(dtype), embedding.weight.grad, rtol=2e-2, atol=2e-2)
    assert (layer.in_features, layer.out_features) == (10, 6)


@EVERY
@pytest.mark.parametrize("stage", ["noisy", "amplified"])
def test_mix_follows_the_formulas_in_float64(kind, stage):
    embedding = MAKE[kind]().double()
    layer = wrap(embedding).base_model.model[0]
    weight = layer.dps_weight["default"]
    base = torch.randn_like(weight)
    if stage == "noisy":
        factor = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64, device=DEVICE)
        effective = NoisyWeight(base, layer.layout.columns.spread(factor), 0.6)
    else:
        factor = (torch.rand_like(weight) < 0.6).double()
        effective = AmplifiedWeight(base, 0.6, Mask.of(factor.bool()))
    output = layer._compute(INDICES, weight, None, effective)
    embedding.weight.data = base + factor * (weight.detach() - base) / 0.6
    embedding.weight.requires_grad_(True)
    expected = embedding(INDICES)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(output)
    output.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(weight.grad, embedding.weight.grad * factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_training_follows_the_reference(variant, scope):
    torch.manual_seed(0)
    model, plain = nn.Embedding(9, 4, padding_idx=0, device=DEVICE), nn.Embedding(9, 4, padding_idx=0, device=DEVICE)
    plain.load_state_dict(model.state_dict())
    fields = {"density": 0.6, "stage_steps": 3, "scope": scope}
    model = wrap(model, variant=variant, seed=5, **fields)
    if variant == "mix":
        noise = ColumnNoise(0.6, seed=5)
        draw = lambda step: [row.float() for row in noise.draw(step, [4], DEVICE)]  # noqa: E731
        reference = ReferenceMix([plain.weight], draw=draw, decay=False, **fields)
    else:
        reference = ReferenceDense([plain.weight], **fields)
    ours, theirs = AdamW(trainable(model), lr=1e-2), AdamW(plain.parameters(), lr=1e-2)
    for _ in range(14):
        x, y = torch.randint(9, (8,), device=DEVICE), torch.randint(4, (8,), device=DEVICE)
        ours.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        ours.step()
        theirs.zero_grad()
        weight = reference.effective()[0] if variant == "mix" else plain.weight
        nn.functional.cross_entropy(nn.functional.embedding(x, weight, padding_idx=0), y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        (tracked,) = model.base_model.model[0].dps_controllers["default"].weights
        torch.testing.assert_close(tracked.weight.detach(), plain.weight.detach(), rtol=0, atol=1e-6)
        assert (tracked.frozen is not None) == (not reference.accumulating)
        if tracked.frozen is not None:
            assert torch.equal(tracked.frozen.mask.keep.bool(), reference.masks[0])


def test_mix_computes_no_more_than_the_rows_it_needs_and_keeps_none(monkeypatch):
    model = wrap(nn.Embedding(1000, 6), variant="mix")
    weight = model.base_model.model[0].dps_weight["default"]
    made: list[torch.Tensor] = []
    for kind in (NoisyWeight, AmplifiedWeight):
        monkeypatch.setattr(kind, "of", lambda *args, of=kind.of: made.append(of(*args)) or made[-1])
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    kept: list[torch.Tensor] = []
    for _ in range(3):  # both stages
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(INDICES).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.dps_status().stage is Stage.SUBNETWORK
    assert {tensor.shape for tensor in made} == {(2, 4, 6)}
    assert not [tensor for tensor in kept if tensor.numel() >= weight.numel()]


class Doubled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


class WronglyScaled(Doubled):
    embed_scale = 1.0


class Unscaled(nn.Embedding):
    """Has the attribute and does not use it."""

    embed_scale = 3.0


class WithPlaces(nn.Embedding):
    embed_scale = 1.0

    def forward(self, x, places):
        return super().forward(x + places)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(10, 6, max_norm=1.0), "max_norm=1.0.*Set its `max_norm` to None"),
        (lambda: nn.Embedding(10, 6, sparse=True), "sparse=True.*Set its `sparse` to False"),
        (lambda: Doubled(10, 6), "is a Doubled, which DPS cannot train: its forward"),
        (lambda: WronglyScaled(10, 6), "is a WronglyScaled, which DPS cannot train"),
        (lambda: WithPlaces(10, 6), "is a WithPlaces, which DPS cannot train"),
        (lambda: BartLearnedPositionalEmbedding(10, 6), "is a BartLearnedPositionalEmbedding, which DPS cannot train"),
        (lambda: Gemma3TextScaledWordEmbedding(10, 6, 3, torch.ones(6)), "is a Gemma3TextScaledWordEmbedding"),
    ],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_refused_by_name(make, message):
    with pytest.raises(TargetError, match=message):
        wrap(make())


def test_an_unused_scale_is_not_used():
    embedding = Unscaled(10, 6)
    assert torch.equal(wrap(embedding)(INDICES), embedding(INDICES))


def test_the_padding_row_stays():
    embedding = nn.Embedding(10, 6, padding_idx=3)
    model = wrap(embedding)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(6):
        model(INDICES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = model.base_model.model[0].dps_weight["default"]
    assert torch.equal(weight[3], embedding.weight[3])
    assert not torch.equal(weight, embedding.weight)
    assert model.dps_status().engaged
