"""DPS on convolutions: `torch.nn.Conv1d`, `Conv2d` and `Conv3d`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.tiles import TileDelta
from peft_dps.masking.effective_layers import effective_conv
from peft_dps.masking.effective_weight import EffectiveWeight
from peft_dps.tensors.layout import Layout, out_in
from peft_dps.tuner.layers.layer import DPSLayer, cast_to_activation
from peft_dps.tuner.layers.pretrained import PretrainedWeight


class Conv(DPSLayer):
    """DPS on a convolution; weight `[out, in / groups, *kernel]`."""

    def __init__(self, base_layer: nn.Module, base_weight: PretrainedWeight | None = None) -> None:
        super().__init__(base_layer, base_weight)
        base: Any = base_layer
        self.in_features: int = base.in_channels
        self.out_features: int = base.out_channels

    @property
    def layout(self) -> Layout:
        """A row per output channel; a column per input channel of a group, over all output channels of it."""
        base: Any = self.get_base_layer()
        return out_in(tuple(self.pretrained_parameter.shape), base.groups)

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        base: Any = self.get_base_layer()
        if effective is None:
            output: torch.Tensor = base._conv_forward(x, *cast_to_activation(x, weight, bias))
            return output
        batched = x.dim() == len(base.kernel_size) + 2
        x, padding = _pad(x if batched else x.unsqueeze(0), base)
        output = effective_conv(
            x, weight, bias, effective,
            stride=base.stride, padding=padding, dilation=base.dilation, groups=base.groups,
        )  # fmt: skip
        return output if batched else output.squeeze(0)

    def _add_delta(
        self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, delta: Delta
    ) -> torch.Tensor:
        base: Any = self.get_base_layer()
        y, channels = compute(x), -len(base.kernel_size) - 1
        if isinstance(delta, TileDelta):
            own: torch.Tensor = base._conv_forward(x.to(y.dtype), delta.dense(base.weight).to(y.dtype), None)
            return y + own
        for values, numbers in delta.parts():
            values = values.to(y.dtype)
            if delta.axis == 1:
                y = y + base._conv_forward(x.index_select(channels, numbers).to(y.dtype), values, None)
            elif base.groups == 1:
                y = y.index_add(channels, numbers, base._conv_forward(x.to(y.dtype), values, None))
            else:
                y = y + self._grouped_rows(x.to(y.dtype), values, numbers)
        return y

    def _grouped_rows(self, x: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Convolve with rows of several groups, each of which sees its own input channels."""
        base: Any = self.get_base_layer()
        whole = values.new_zeros(tuple(base.weight.shape)).index_add(0, numbers, values)
        output: torch.Tensor = base._conv_forward(x, whole, None)
        return output

    def _weight_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        batched = x.dim() == len(base.kernel_size) + 2
        x, gradient = (x, gradient) if batched else (x.unsqueeze(0), gradient.unsqueeze(0))
        x, padding = _pad(x.to(gradient.dtype), base)
        weight = gradient.new_zeros(()).expand(base.weight.shape)  # of which nothing but the shape matters
        empty = [0] * len(base.stride)
        of_weight: torch.Tensor = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, base.stride, padding, base.dilation, False, empty, base.groups,
            [False, True, False],
        )[1]  # fmt: skip
        return of_weight

    def _add_bias(self, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return y + bias.to(y.dtype).view(-1, *[1] * len(base.kernel_size))


class Conv1d(Conv):
    """DPS on `torch.nn.Conv1d`."""


class Conv2d(Conv):
    """DPS on `torch.nn.Conv2d`."""


class Conv3d(Conv):
    """DPS on `torch.nn.Conv3d`."""


def _pad(x: torch.Tensor, base: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Pad as the module would, but for zeros on both sides, whose number is returned."""
    if base.padding_mode == "zeros" and not isinstance(base.padding, str):
        return x, base.padding
    # What torch's own forward pads with; "same" may need one more on one side.
    both_sides = base._reversed_padding_repeated_twice
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    return F.pad(x, both_sides, mode=mode), (0,) * len(base.kernel_size)
