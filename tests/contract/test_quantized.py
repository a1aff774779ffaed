"""Quantized weights are refused with the reason: as they look, and by the real libraries where they are installed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dps import DPSConfig, DPSLayer
from peft_dps.errors import TargetError

REASON = "DPS trains full-precision weights"
REMEDY = "load the model without quantization, or use `storage='compact'` with `granularity='column'` or 'row'"


class Packed(nn.Module):
    """A linear layer of GPTQ, AWQ, HQQ or compressed-tensors: no `weight`, but packed integers under another name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer(name, torch.zeros(2, 16, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 16))
        self.in_features = self.out_features = 16


class Int8Params(nn.Parameter):
    """As bitsandbytes keeps 8 bits, here before they are quantized: a floating dtype."""

    SCB = None


class Params4bit(nn.Parameter):
    """As bitsandbytes keeps 4 bits, packed into another dtype, a floating one if asked to."""

    quant_state = None


class Subclass(torch.Tensor):
    """As torchao keeps weights: a tensor subclass of a floating dtype."""


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(weight, requires_grad=False) if type(weight) in (torch.Tensor, Subclass) else weight
    return layer


LOOKS = {
    "GPTQ, AWQ": lambda: Packed("qweight"),
    "HQQ": lambda: Packed("W_q"),
    "compressed-tensors": lambda: Packed("weight_packed"),
    "AQLM": lambda: Packed("codes"),
    "EETQ": lambda: linear(torch.zeros(16, 16, dtype=torch.int8)),
    "FP8": lambda: linear(torch.zeros(16, 16).to(torch.float8_e4m3fn)),
    "bitsandbytes 8 bit": lambda: linear(Int8Params(torch.zeros(16, 16))),
    "bitsandbytes 4 bit": lambda: linear(Params4bit(torch.zeros(128, 1))),
    "torchao": lambda: linear(torch.zeros(16, 16).as_subclass(Subclass)),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_quantized_targets(kind):
    model = nn.ModuleDict({"fc": nn.Linear(16, 16), "odd": LOOKS[kind]()})
    with pytest.raises(TargetError, match="'odd' is quantized") as caught:
        get_peft_model(model, DPSConfig(stage_steps=2, target_modules=["fc", "odd"]))
    assert REASON in str(caught.value)
    assert REMEDY in str(caught.value)
    assert type(model["fc"]) is nn.Linear
    model = get_peft_model(model, DPSConfig(stage_steps=2, target_modules=["fc", "odd"], exclude_modules=["odd"]))
    assert isinstance(model.base_model.model["fc"], DPSLayer)


@pytest.mark.parametrize("kind", ["GPTQ, AWQ", "HQQ", "compressed-tensors", "AQLM"])
def test_all_linear_does_not_pass_over_packed_layers(kind):
    """They are no `nn.Linear`, so that "all-linear" would train what little is left."""
    model = nn.ModuleDict({"fc": nn.Linear(16, 16), "odd": LOOKS[kind]()})
    with pytest.raises(TargetError, match=r"'odd' is a Packed.*'all-linear' would leave most of it out") as caught:
        get_peft_model(model, DPSConfig(stage_steps=2))
    assert REMEDY in str(caught.value)
    assert type(model["fc"]) is nn.Linear


@pytest.fixture
def folder(tmp_path):
    """A saved model, for transformers to quantize on loading."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=24,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def refuse(model: nn.Module, layer: str, weight: str) -> None:
    target = model.model.layers[0].self_attn.q_proj
    assert (type(target).__name__, type(target.weight).__name__) == (layer, weight)
    with pytest.raises(TargetError, match="q_proj' is quantized") as caught:
        get_peft_model(model, DPSConfig(stage_steps=2, task_type="CAUSAL_LM"))
    assert REASON in str(caught.value)
    assert REMEDY in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(folder, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    refuse(model, *{8: ("Linear8bitLt", "Int8Params"), 4: ("Linear4bit", "Params4bit")}[bits])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torchao(folder):
    torchao = pytest.importorskip("torchao")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    refuse(model, "Linear", "Int8Tensor")
