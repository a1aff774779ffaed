"""A pretrained weight that nothing may read has a shape, a dtype and a device, and no values."""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from peft_dps.tuner.layers.pretrained import PretrainedWeight, UnreadWeight, device_of, is_offloaded
from peft_dps.tuner.layers.state import LayerState


def test_what_stands_in_for_a_weight():
    base = nn.Module()
    base.qweight = nn.Parameter(torch.ones(7, dtype=torch.int32), requires_grad=False)
    base.register_buffer("bias", torch.ones(5))
    weight = UnreadWeight((5, 3), torch.bfloat16, "its weight is quantized")
    stand_in, bias = weight.parameters(base)
    assert (tuple(stand_in.shape), stand_in.dtype, stand_in.requires_grad) == ((5, 3), torch.bfloat16, False)
    assert stand_in.untyped_storage().nbytes() == 2
    assert bias is base.bias
    assert weight.in_base(base)[0] is base.qweight
    assert not weight.unmerge(base)
    weight.apply(base, torch.Tensor.double, base.double)
    assert base.bias.dtype == torch.float64
    assert PretrainedWeight("weight", "bias").unread is None


def test_a_bias_that_is_none():
    base = nn.Module()
    weight = UnreadWeight((5, 3), torch.float32, "")
    for absent in (None, torch.empty(0), False):
        base.bias = absent
        assert weight.parameters(base)[1] is None
    assert weight.in_base(base)[0].shape == (5, 3)


def test_the_device_that_a_layer_computes_on():
    base = nn.Linear(3, 5, device="meta")
    assert device_of(base).type == "meta"
    assert not is_offloaded(base)
    values = {"weight": torch.ones(5, 3), "bias": torch.ones(5)}
    add_hook_to_module(base, AlignDevicesHook("cpu", offload=True, weights_map=values))
    assert is_offloaded(base)
    assert device_of(base).type == "cpu"
    assert device_of(nn.ReLU()).type == "cpu"


def test_a_forward_of_a_copy_reads_no_pretrained_weight(make_model, batches, monkeypatch):
    model = make_model(offload_base=True, stage_steps=5)

    def read(layer):
        raise AssertionError("W0 was read")

    monkeypatch.setattr(LayerState, "pretrained", read)
    model(batches(1)[0][0])
