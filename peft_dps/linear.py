"""DPS on linear modules: `torch.nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peft_dps.effective import EffectiveWeight, effective_linear
from peft_dps.layer import DPSLayer


class Linear(DPSLayer):
    """DPS on `torch.nn.Linear`; weight `[out, in]`."""

    input_axis = 1

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.out_features, self.in_features = self._pretrained()[0].shape

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        if effective is not None:
            return effective_linear(x, weight, bias, effective, input_axis=self.input_axis)
        return F.linear(x, *_cast_to_activation(x, weight, bias))


class Conv1DLinear(DPSLayer):
    """DPS on transformers' `Conv1D`, a linear layer that stores its weight as `[in, out]`."""

    input_axis = 0

    # "Linear" in the class name is what lets PEFT find the layer for a second "all-linear" adapter.

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self._pretrained()[0].shape

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        if effective is not None:
            return effective_linear(x, weight, bias, effective, input_axis=self.input_axis)
        weight, bias = _cast_to_activation(x, weight, bias)
        return F.linear(x, weight.t(), bias)


def _cast_to_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cast fp32 master weights to the activation's dtype; autocast does that by itself."""
    if torch.is_autocast_enabled(x.device.type):
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
