"""Effective weights of Mixout and mixconnect: as those of DPS Mix, with the gradient that autograd would give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peft_dps.masking.effective_weight import EffectiveWeight, NoisyWeight
from peft_dps.masking.random_bits import counter, takes_part

_CPU_CHUNK = 1 << 16  # its words stay in the cache
_DEVICE_CHUNK = 1 << 22


@dataclass(frozen=True)
class MixedColumns(NoisyWeight):
    """W_eff = W0 + b * (W - W0) / density, with b per input column; dL/dW = dL/dW_eff * b / density."""

    def at(self, rows: torch.Tensor) -> MixedColumns:
        """Return the same for some rows of the weight, which all have the same columns."""
        return MixedColumns(self.base_weight[rows.to(self.base_weight.device)], self.columns, self.density)

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply the gradient of W_eff by b / density, in place."""
        return super().gradient_(gradient).div_(self.density)

    def active_columns(self) -> None:
        """Return None: all columns pass through `gradient_`."""


@dataclass(frozen=True)
class EntryBits:
    """b, 0 or 1 per entry of a weight in one step: made anew whenever it is looked at.

    Attributes:
        weight: Word of the weight.
        step: Word of the step.
        density: Probability of b = 1.
    """

    weight: int
    step: int
    density: float

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Return b, bool, at places in the weight, int64."""
        return takes_part(counter(places, self.weight) ^ self.step, self.density)


@dataclass(frozen=True)
class MixedEntries(EffectiveWeight):
    """W_eff = W0 + b * (W - W0) / density, with b per entry; dL/dW = dL/dW_eff * b / density.

    Nothing of the weight's size is kept from forward to backward: b is made twice, piece by piece.

    Attributes:
        base_weight: W0, perhaps on another device.
        bits: b.
        density: Probability of b = 1.
        rows: Indices of the rows that the forward uses, an embedding's; None for all.
    """

    base_weight: torch.Tensor
    bits: EntryBits
    density: float
    rows: torch.Tensor | None = None

    def of(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W_eff in the weight's shape and dtype, in `out` if given, else as a new tensor."""
        weight = weight.detach()
        effective = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
        flat = effective.view(-1), weight.reshape(-1), self.base_weight.reshape(-1)
        for taking_part, (made, now, before) in self._pieces(*flat):
            torch.lerp(before.to(now), now, taking_part.to(now.dtype).div_(self.density), out=made)
        return effective

    def at(self, rows: torch.Tensor) -> MixedEntries:
        """Return the same for some rows of the weight."""
        return MixedEntries(self.base_weight[rows.to(self.base_weight.device)], self.bits, self.density, rows)

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply the gradient of W_eff by b / density, in place; where b = 0 it is zero, whatever it was."""
        whole = gradient.contiguous()
        for taking_part, (piece,) in self._pieces(whole.view(-1)):
            piece.masked_fill_(~taking_part, 0.0).div_(self.density)
        return gradient if whole is gradient else gradient.copy_(whole)

    def _pieces(self, *flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """Cut flat tensors into pieces, with b of each."""
        device, entries = flat[0].device, flat[0].numel()
        chunk = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
        rows = None if self.rows is None else self.rows.reshape(-1).to(device)
        for start in range(0, entries, chunk):
            places = torch.arange(start, min(start + chunk, entries), device=device)
            if rows is not None:
                row = self.base_weight.shape[-1]
                places = rows[places // row] * row + places % row
            yield self.bits.at(places), tuple(each[start : start + chunk] for each in flat)
