"""DPS on linear modules: `torch.nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peft_dps.masking.effective import EffectiveWeight, effective_linear
from peft_dps.tensors.layout import Layout, in_out, out_in
from peft_dps.tuner.layers.layer import DPSLayer, cast_to_activation


class Linear(DPSLayer):
    """DPS on `torch.nn.Linear`; weight `[out, in]`."""

    supports_lora = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.out_features, self.in_features = self.pretrained_parameter.shape

    @property
    def layout(self) -> Layout:
        """A row per output, a column per input."""
        return out_in((self.out_features, self.in_features))

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        if effective is not None:
            return effective_linear(x, weight, bias, effective, input_axis=1)
        return F.linear(x, *cast_to_activation(x, weight, bias))


class Conv1DLinear(DPSLayer):
    """DPS on transformers' `Conv1D`, a linear layer that stores its weight as `[in, out]`."""

    supports_lora = True

    # "Linear" in the class name is what lets PEFT find the layer for a second "all-linear" adapter.

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self.pretrained_parameter.shape

    @property
    def layout(self) -> Layout:
        """A row per output, a column per input."""
        return in_out((self.in_features, self.out_features))

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        if effective is not None:
            return effective_linear(x, weight, bias, effective, input_axis=0)
        weight, bias = cast_to_activation(x, weight, bias)
        return F.linear(x, weight.t(), bias)
