"""DPS on linear modules: `torch.nn.Linear`, transformers' `Conv1D`, and quantized ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from peft_dps.masking.compact.delta import Delta, EntryDelta
from peft_dps.masking.compact.entries import linear_with_entries
from peft_dps.masking.compact.linear import add_columns, add_rows
from peft_dps.masking.compact.split_linear import add_split_columns, add_split_rows
from peft_dps.masking.compact.tiles import TileDelta, add_tiles
from peft_dps.masking.effective_linear import effective_linear
from peft_dps.masking.effective_weight import EffectiveWeight
from peft_dps.tensors.layout import Layout, in_out, out_in
from peft_dps.tensors.split import Split, split_of
from peft_dps.training.guards import refuse_part_of_layer
from peft_dps.tuner.layers.layer import DPSLayer, cast_to_activation
from peft_dps.tuner.layers.pretrained import PretrainedWeight


class _AnyLinear(DPSLayer):
    """DPS on a linear module, whichever axis of its weight holds the inputs."""

    supports_lora = True
    input_axis: ClassVar[int]

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        if effective is not None:
            return effective_linear(x, weight, bias, effective, input_axis=self.input_axis)
        weight, bias = cast_to_activation(x, weight, bias)
        return F.linear(x, self._out_in(weight), bias)

    def _add_delta(
        self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, delta: Delta
    ) -> torch.Tensor:
        split = self.split
        if split is not None:
            y = compute(x)
            add_split = add_split_columns if delta.axis == self.input_axis else add_split_rows
            return add_split(y, x, delta.parts(), split.whole if self._is_whole(x, y) else split)
        if self.unread is not None:
            # What an unknown module returns it may need for its backward pass.
            base, compute = compute, lambda x: base(x).clone()
        if isinstance(delta, TileDelta):
            return self._add_tiles(partial(self._compute_whole, compute), x, delta)
        add = add_columns if delta.axis == self.input_axis else add_rows
        kept = None if delta.kept is None else (self._out_in(delta.kept[0]), delta.kept[1])
        self._require_whole(x, self.in_features)
        return add(partial(self._compute_whole, compute), x, self._out_in(delta.weight), delta.index, kept)

    def _compute_split(self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y, split = compute(x), self.split
        if split is not None:
            fits = self._is_whole(x, y) or (y.shape[-1], x.shape[-1]) == split.part_shape
            if not fits or x.shape[:-1] != y.shape[:-1] or DTensor in (type(x), type(y)):
                refuse_part_of_layer(", ".join(self.active_adapters))
        return y

    def _is_whole(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Tell whether every process has all inputs and outputs: a plan may gather outputs, or cut inputs itself."""
        return (y.shape[-1], x.shape[-1]) == (self.out_features, self.in_features)

    def _add_tiles(
        self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, delta: TileDelta
    ) -> torch.Tensor:
        self._require_whole(x, self.in_features)
        if torch.compiler.is_compiling():  # where the tiles would be constants
            y = compute(x)
            return y + F.linear(x.to(y.dtype), self._out_in(delta.dense(delta.weight)).to(y.dtype))
        parts = [(values, delta.corners(numbers)) for values, numbers in delta.parts()]
        if self.input_axis == 0:
            parts = [(values.mT, [corner[::-1] for corner in corners]) for values, corners in parts]
        return add_tiles(compute, x, parts)

    def _compute_whole(self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y = compute(x)
        self._require_whole(y, self.out_features)
        return y

    def _require_whole(self, activations: torch.Tensor, features: int) -> None:
        if activations.shape[-1] != features:
            refuse_part_of_layer(", ".join(self.active_adapters))

    def _weight_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        rows, columns = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1]).to(gradient.dtype)
        return rows.t() @ columns if self.input_axis == 1 else columns.t() @ rows

    def _adds_entries(self, name: str) -> bool:
        return isinstance(self.delta(name), EntryDelta)

    def _compute_with_entries(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.pretrained()
        bias = self.dps_bias.get(name, bias)
        return linear_with_entries(x, weight, bias, self.dps_delta[name].parts(), input_axis=self.input_axis)  # type: ignore[operator]

    def _out_in(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.input_axis == 1 else weight.t()


class Linear(_AnyLinear):
    """DPS on `torch.nn.Linear`, or a quantized layer in its place; weight `[out, in]`."""

    input_axis = 1

    def __init__(self, base_layer: nn.Module, base_weight: PretrainedWeight | None = None) -> None:
        super().__init__(base_layer, base_weight)
        self.out_features, self.in_features = self.pretrained_parameter.shape

    @property
    def split(self) -> Split | None:
        """How processes that compute a forward together have split the layer; see `DPSLayer.split`."""
        base = self.get_base_layer()
        weight: torch.Tensor | None = base._parameters.get("weight")
        return split_of(weight) if isinstance(weight, DTensor) and not isinstance(base, FSDPModule) else None

    @property
    def layout(self) -> Layout:
        """A row per output, a column per input."""
        return out_in((self.out_features, self.in_features))


class Conv1DLinear(_AnyLinear):
    """DPS on transformers' `Conv1D`, a linear layer that stores its weight as `[in, out]`."""

    # "Linear" in the class name is what lets PEFT find the layer for a second "all-linear" adapter.

    input_axis = 0

    def __init__(self, base_layer: nn.Module, base_weight: PretrainedWeight | None = None) -> None:
        super().__init__(base_layer, base_weight)
        self.in_features, self.out_features = self.pretrained_parameter.shape

    @property
    def layout(self) -> Layout:
        """A row per output, a column per input."""
        return in_out((self.in_features, self.out_features))
