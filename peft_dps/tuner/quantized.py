"""What a quantized layer looks like, by the marks that the libraries leave: none of them is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED = ("qweight", "W_q", "weight_packed", "codes")
_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"))  # the latter in older layers of GPTQ


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer holds quantized weights under a name of their own, as GPTQ, AWQ, HQQ and others do."""
    held = (getattr(module, name, None) for name in _PACKED)
    return linear_shape(module) is not None and any(isinstance(each, torch.Tensor) for each in held)


def is_quantized(module: nn.Module, name: str = "weight") -> bool:
    """Tell whether a weight of a module is stored as something else than the floats that it stands for."""
    weight = getattr(module, name, None)
    return is_packed(module) or (isinstance(weight, torch.Tensor) and _is_quantized(weight))


def _is_quantized(weight: torch.Tensor) -> bool:
    # torchao's weights are tensor subclasses of a floating dtype; bitsandbytes' are parameters with a state.
    if isinstance(weight, nn.UninitializedParameter):
        return False
    subclass = type(weight.data) is not torch.Tensor and not isinstance(weight, DTensor)
    stored = weight.dtype not in TRAINABLE_DTYPES
    return stored or subclass or any(hasattr(weight, name) for name in ("quant_state", "SCB"))


def stored_as(module: nn.Module, name: str = "weight") -> str:
    """Return how errors call a quantized layer."""
    weight = getattr(module, name, None)
    kind = "packed"
    if isinstance(weight, torch.Tensor):
        kind = str(weight.dtype) if type(weight.data) is torch.Tensor else type(weight.data).__name__
    return f"{type(module).__name__}, {kind}"


def linear_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return (out, in) of a module that says that it is a linear layer; None for others."""
    for inputs, outputs in _FEATURES:
        shape: tuple[Any, ...] = getattr(module, outputs, None), getattr(module, inputs, None)
        if all(type(size) is int and size > 0 for size in shape):
            return shape
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "EetqLinear" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[1], weight.shape[0]
    return None


def remedy_for_quantized(storage: str, granularity: str) -> str:
    """Return what to do where a method computes with the values of weights that are quantized."""
    if storage == "compact":
        return (
            f"`granularity={granularity!r}` computes with the values of the weight: use 'column' or 'row', which only "
            "call the layer, or load the model without quantization."
        )
    return (
        "DPS trains full-precision weights: load the model without quantization, or use `storage='compact'` with "
        "`granularity='column'` or 'row', which trains a few columns or rows beside weights that stay as they are."
    )
