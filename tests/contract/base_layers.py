"""Linear layers of each kind that an adapter may meet, made from an ordinary one.

Libraries whose kernels need an accelerator are stood in for by modules that have their attributes, and a forward and a
backward pass of their own, as their kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.device import DEVICE

# What transformers says of a model that bitsandbytes has quantized, which PEFT's LoRA asks for.
MARKS = {"bitsandbytes 8 bit": "is_loaded_in_8bit", "bitsandbytes 4 bit": "is_loaded_in_4bit"}


class Kernel(torch.autograd.Function):
    """A product with a weight of integers, which has no gradient, as the kernels of the libraries compute it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return x @ weight.to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.weight.to(gradient.dtype), None


class Packed(nn.Module):
    """A layer with integers under a name of their own, and the sizes as its library calls them."""

    def __init__(self, linear: nn.Linear, name: str, *, parameter: bool = False, sizes: str = "{}_features") -> None:
        super().__init__()
        setattr(self, sizes.format("in"), linear.in_features)
        setattr(self, sizes.format("out"), linear.out_features)
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        integers = (linear.weight.detach() / scales).round().to(torch.int8)
        self.name = name
        if parameter:
            self.register_parameter(name, nn.Parameter(self.stored(integers), requires_grad=False))
        else:
            self.register_buffer(name, self.stored(integers))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def stored(self, integers: torch.Tensor) -> torch.Tensor:
        return integers

    def dequantized(self) -> torch.Tensor:
        return self.stored(getattr(self, self.name)) * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = Kernel.apply(x, self.dequantized())
        return output if self.bias is None else output + self.bias


class EetqLinear(Packed):
    """EETQ: 8 bits under the name of a weight, turned around, and no sizes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, "weight", parameter=True)
        del self.in_features, self.out_features

    def stored(self, integers: torch.Tensor) -> torch.Tensor:
        return integers.t().contiguous()


class FP8Linear(nn.Linear):
    """FP8, as transformers keeps it: a subclass of `torch.nn.Linear` with a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = linear.bias

    def dequantized(self) -> torch.Tensor:
        return self.weight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Kernel.apply(x, self.dequantized()) + self.bias


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.7 * super().forward(x))  # whose backward pass needs its output


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4", compute_dtype=torch.float32
    )
    layer.support_avx512bf16_for_cpu = False  # whose kernel takes multiples of 32 rows alone
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def torchao(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def parametrized(linear: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear)


def scaled(linear: nn.Linear) -> nn.Module:
    layer = Scaled(linear.in_features, linear.out_features)
    layer.load_state_dict(linear.state_dict())
    return layer


def half(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: linear.to(dtype)


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        make: Makes one of an ordinary layer.
        real: Whether it is the library's own, so that PEFT's LoRA knows it.
        dtype: What it takes and returns.
    """

    name: str
    make: Callable[[nn.Linear], nn.Module]
    real: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    def layer(self, inputs: int = 16, outputs: int = 24) -> nn.Module:
        """Make a frozen one."""
        torch.manual_seed(0)
        return self.make(nn.Linear(inputs, outputs)).requires_grad_(False)


QUANTIZED = [
    Kind("GPTQ, AWQ", lambda linear: Packed(linear, "qweight"), real=False),
    Kind("GPTQ, older", lambda linear: Packed(linear, "qweight", sizes="{}features"), real=False),
    Kind("HQQ", lambda linear: Packed(linear, "W_q", parameter=True), real=False),
    Kind("compressed-tensors", lambda linear: Packed(linear, "weight_packed"), real=False),
    Kind("AQLM", lambda linear: Packed(linear, "codes"), real=False),
    Kind("EETQ", EetqLinear, real=False),
    Kind("FP8", FP8Linear),
    Kind("bitsandbytes 8 bit", bitsandbytes_8bit),
    Kind("bitsandbytes 4 bit", bitsandbytes_4bit),
    Kind("torchao", torchao),
]
ORDINARY = [
    Kind("fp32", lambda linear: linear),
    Kind("bf16", half(torch.bfloat16), dtype=torch.bfloat16),
    Kind("fp16", half(torch.float16), dtype=torch.float16),
]
COMPUTED = [
    Kind("weights computed from others", parametrized),
    Kind("subclasses that compute something else", scaled),
]


class Net(nn.Module):
    """A layer of a kind between two ordinary ones."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dtype = kind.dtype
        self.first = nn.Linear(8, 16)
        self.odd = kind.layer()
        self.head = nn.Linear(24, 3)
        if kind.name in MARKS:
            setattr(self, MARKS[kind.name], True)
        self.to(DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)).to(self.dtype)
        return self.head(torch.tanh(self.odd(hidden)).float())


def weight_of(layer: nn.Module) -> torch.Tensor:
    """Return the weight that a layer computes with, found by what it returns."""
    with torch.no_grad():
        inputs = 16
        dtype = next(
            (t.dtype for t in layer.parameters() if t.dtype in (torch.bfloat16, torch.float16)), torch.float32
        )
        zero = layer(torch.zeros(1, inputs, dtype=dtype, device=DEVICE))
        return (layer(torch.eye(inputs, dtype=dtype, device=DEVICE)) - zero).t().float()


def bytes_of(module: nn.Module) -> list[torch.Tensor]:
    """Copy all bits that a module holds, however it stores them."""
    found = []
    for tensor in (*module.parameters(), *module.buffers()):
        inner = getattr(tensor.data, "__tensor_flatten__", None)
        parts = [tensor.data] if inner is None else [getattr(tensor.data, name) for name in inner()[0]]
        found += [part.detach().clone().contiguous().view(torch.uint8) for part in parts]
    return found
