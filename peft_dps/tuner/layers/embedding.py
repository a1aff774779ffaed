"""DPS on `torch.nn.Embedding`, and on subclasses that multiply its output by a constant `embed_scale`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.tiles import TileDelta
from peft_dps.masking.effective_layers import effective_embedding
from peft_dps.masking.effective_weight import EffectiveWeight
from peft_dps.tensors.layout import Layout, out_in
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.layers.pretrained import PretrainedWeight


class Embedding(DPSLayer):
    """DPS on `torch.nn.Embedding`; weight `[rows, dimensions]`."""

    def __init__(self, base_layer: nn.Module, base_weight: PretrainedWeight | None = None) -> None:
        super().__init__(base_layer, base_weight)
        base: Any = base_layer
        self.in_features: int = base.num_embeddings
        self.out_features: int = base.embedding_dim
        # Of the units that were asked for last. It holds their tensors, so that no other has the place of one.
        self._known_slots: list[tuple[torch.Tensor, int, torch.Tensor, int | None]] = []

    @property
    def layout(self) -> Layout:
        """A row per token, a column per dimension."""
        return out_in((self.in_features, self.out_features))

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        base: Any = self.get_base_layer()
        if effective is None:
            rows = F.embedding(x, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        else:
            rows = effective_embedding(
                x, weight, effective,
                padding_index=-1 if base.padding_idx is None else base.padding_idx,
                scale_grad_by_freq=base.scale_grad_by_freq,
            )  # fmt: skip
        return _scaled(rows.to(base.weight.dtype), base)

    def _add_delta(
        self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, delta: Delta
    ) -> torch.Tensor:
        base: Any = self.get_base_layer()
        y = compute(x)
        if isinstance(delta, TileDelta):
            own = F.embedding(
                x, delta.dense(base.weight), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
            )
            return y + _scaled(own.to(y.dtype), base)
        for values, numbers in delta.parts():
            if delta.axis == 0:
                slots, padding = self._slots_of(numbers)
                values = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])  # of tokens that are no units
                own = F.embedding(slots[x], values, padding, scale_grad_by_freq=base.scale_grad_by_freq)
                y = y + _scaled(own.to(y.dtype), base)
            else:
                own = F.embedding(x, values, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
                y = y.index_add(-1, numbers, _scaled(own.to(y.dtype), base))
        return y

    def _slots_of(self, numbers: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """Return the slot of each token, one past the last for those that have none, and that of padding."""
        for known, version, slots, padding in self._known_slots:
            if known is numbers and version == numbers._version:
                return slots, padding
        base: Any = self.get_base_layer()
        slots = numbers.new_full((self.in_features,), len(numbers))
        slots[numbers.long()] = torch.arange(len(numbers), dtype=slots.dtype, device=slots.device)
        padding = None if base.padding_idx is None else int(slots[base.padding_idx])
        self._known_slots = [(numbers, numbers._version, slots, padding), *self._known_slots[:3]]
        return slots, padding

    def _weight_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        padding = -1 if base.padding_idx is None else base.padding_idx
        whole: torch.Tensor = torch.ops.aten.embedding_dense_backward(
            _scaled(gradient, base), x, self.in_features, padding, base.scale_grad_by_freq
        )
        return whole


def _scaled(rows: torch.Tensor, base: Any) -> torch.Tensor:
    if type(base).forward is nn.Embedding.forward:
        return rows
    scale = base.embed_scale
    return rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)


def computes_alike(base: nn.Embedding) -> bool:
    """Tell whether an embedding computes what the DPS layer would: a look-up, times `embed_scale` in a subclass.

    A forward of its own is tried out on some rows, since the attribute does not tell what is done with it.
    """
    if type(base).forward is nn.Embedding.forward:
        return True
    scale = getattr(base, "embed_scale", None)
    if not isinstance(scale, (int, float)) and not (isinstance(scale, torch.Tensor) and scale.numel() == 1):
        return False
    last = base.num_embeddings - 1
    indices = torch.arange(8, device=base.weight.device).mul_(last).div_(7, rounding_mode="floor").unsqueeze(0)
    with torch.no_grad():
        expected = _scaled(F.embedding(indices, base.weight), base)
        try:
            actual = type(base).forward(base, indices)
        except (TypeError, ValueError, RuntimeError, LookupError):
            return False
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=0.0)
