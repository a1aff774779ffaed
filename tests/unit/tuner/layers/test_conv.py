from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig, Stage
from peft_dps.masking.effective_weight import AmplifiedWeight, NoisyWeight
from peft_dps.masking.mask import Mask
from peft_dps.masking.noise import ColumnNoise
from tests.device import DEVICE
from tests.reference import ReferenceDense, ReferenceMix
from tests.unit.conftest import controller_of, trainable

MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OPTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2, "padding": 2, "bias": False},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": "valid"},
    "pointwise": {"kernel_size": 1, "groups": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "reflect": {"kernel_size": 2, "padding": "same", "padding_mode": "reflect", "groups": 4},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 3},
}
EVERY = pytest.mark.parametrize(
    ("dimensions", "options"),
    [(dimensions, options) for dimensions in MODULES for options in OPTIONS.values()],
    ids=[f"{dimensions}d {name}" for dimensions in MODULES for name in OPTIONS],
)
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


def wrap(conv, **fields):
    config = DPSConfig(**{"target_modules": ["0"], "stage_steps": 2, "density": 0.5, **fields})
    return get_peft_model(nn.Sequential(conv).to(DEVICE), config)


def make(dimensions, options, dtype=torch.float64):
    conv = MODULES[dimensions](4, 8, **options, dtype=dtype, device=DEVICE)
    x = torch.randn(2, 4, *[7] * dimensions, dtype=dtype, requires_grad=True, device=DEVICE)
    return conv, x


def columns_of(conv, row):
    """One column per input channel, spread over the weight by hand."""
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    b = torch.zeros(conv.weight.shape, dtype=row.dtype, device=DEVICE)
    for out in range(conv.out_channels):
        for channel in range(inputs):
            b[out, channel] = row[(out // outputs) * inputs + channel]
    return b


@EVERY
def test_dense_is_the_module_itself(dimensions, options):
    conv, x = make(dimensions, options)
    model = wrap(conv)
    expected = conv(x)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x[0]), conv(x[0]))  # without a batch
    assert (model.base_model.model[0].in_features, model.base_model.model[0].out_features) == (4, 8)


@EVERY
@pytest.mark.parametrize("kind", ["noisy", "amplified"])
def test_mix_follows_the_formulas_in_float64(dimensions, options, kind):
    conv, x = make(dimensions, options)
    layer = wrap(conv).base_model.model[0]
    weight, bias = layer.dps_weight["default"], layer.dps_bias["default"] if conv.bias is not None else None
    base = torch.randn_like(weight)
    if kind == "noisy":
        row = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64, device=DEVICE)
        factor = columns_of(conv, row)
        effective = NoisyWeight(base, layer.layout.columns.spread(row), 0.6)
    else:
        factor = (torch.rand_like(weight) < 0.6).double()
        effective = AmplifiedWeight(base, 0.6, Mask.of(factor.bool()))
    output = layer._compute(x, weight, bias, effective)
    dense = (base + factor * (weight.detach() - base) / 0.6).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    bias2 = None if bias is None else bias.detach().clone().requires_grad_()
    expected = conv._conv_forward(x2, dense, bias2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(output)
    output.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, dense.grad * factor, rtol=1e-12, atol=1e-12)
    if bias is not None:
        torch.testing.assert_close(bias.grad, bias2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer._compute(x[0], weight, bias, effective), output[0], rtol=1e-12, atol=1e-12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 6, 2, groups=2), nn.Conv1d(6, 4, 3, padding=1)])

    def forward(self, x, weights=(None, None)):
        for layer, weight in zip(self.layers, weights, strict=True):
            x = torch.tanh(layer(x) if weight is None else layer._conv_forward(x, weight, layer.bias)).flatten(2)
        return x.mean(-1)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_training_follows_the_reference(variant, scope):
    torch.manual_seed(0)
    model, plain = Net().to(DEVICE), Net().to(DEVICE)
    plain.load_state_dict(model.state_dict())
    fields = {"density": 0.6, "stage_steps": 3, "scope": scope}
    model = get_peft_model(model, DPSConfig(target_modules=["0", "1"], variant=variant, seed=5, **fields))
    weights = [layer.weight for layer in plain.layers]
    if variant == "mix":
        noise = ColumnNoise(0.6, seed=5)
        reference = ReferenceMix(
            weights,
            draw=lambda step: [
                columns_of(layer, row.float())
                for layer, row in zip(plain.layers, noise.draw(step, [4, 6], DEVICE), strict=True)
            ],
            decay=False,
            **fields,
        )
    else:
        reference = ReferenceDense(weights, **fields)
    ours, theirs = AdamW(trainable(model), lr=1e-2), AdamW(plain.parameters(), lr=1e-2)
    for step in range(14):
        x = torch.randn(8, 4, 4, 4, device=DEVICE)
        y = torch.randint(4, (8,), device=DEVICE)
        ours.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        ours.step()
        theirs.zero_grad()
        output = plain(x, reference.effective() if variant == "mix" else (None, None))
        nn.functional.cross_entropy(output, y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        for index, (tracked, layer) in enumerate(zip(controller_of(model).weights, plain.layers, strict=True)):
            torch.testing.assert_close(tracked.weight.detach(), layer.weight.detach(), rtol=0, atol=1e-6)
            assert (tracked.frozen is not None) == (not reference.accumulating)
            if tracked.frozen is not None:
                assert torch.equal(tracked.frozen.mask.keep.bool(), reference.masks[index]), step


def test_nothing_of_a_weights_size_is_kept_for_backward_but_the_weight_itself():
    conv = nn.Conv2d(16, 16, 5, groups=2)
    model = wrap(conv, variant="mix")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    weight = model.base_model.model[0].dps_weight["default"]
    for _ in range(3):  # both stages
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            model(torch.randn(1, 16, 6, 6, device=DEVICE))
        assert {t.data_ptr() for t in kept if t.numel() >= weight.numel()} == {weight.data_ptr()}
        model(torch.randn(1, 16, 6, 6, device=DEVICE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.dps_status().stage is Stage.SUBNETWORK


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_channels_last_trains_the_same(variant):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = wrap(nn.Conv2d(4, 8, 3, groups=2).to(memory_format=memory_format), variant=variant)
        optimizer = AdamW(trainable(model), lr=1e-2)
        for _ in range(6):
            model(torch.randn(2, 4, 6, 6, device=DEVICE).to(memory_format=memory_format)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not model.dps_status().frozen_moved
        results.append(model.base_model.model[0].dps_weight["default"].detach())
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(results[1], results[0].clone(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_half_precision_and_autocast(variant):
    model = wrap(nn.Conv1d(4, 8, 3, padding=1).bfloat16(), variant=variant)
    x = torch.randn(2, 4, 6, dtype=torch.bfloat16, device=DEVICE)
    assert model(x).dtype == torch.bfloat16
    model(x).float().square().mean().backward()
    assert model.base_model.model[0].dps_weight["default"].grad.dtype == torch.float32
    model = wrap(nn.Conv1d(4, 8, 3, padding=1), variant=variant)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert model(x.float()).dtype == torch.bfloat16
