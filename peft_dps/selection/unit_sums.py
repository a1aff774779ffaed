"""Evidence in compact storage: sums over the entries of each unit, gathered in the backward pass of a layer."""

from __future__ import annotations

from typing import Protocol

import torch

from peft_dps.selection.evidence import Gathered, ObservedWeight
from peft_dps.tensors.layout import Units
from peft_dps.tensors.saved_state import SavedState, State


class Power(Protocol):
    """What is added up: abs(G) ** power."""

    power: int


class UnitSums(Gathered):
    """Per unit, what its entries' evidence adds up to over the passes of a phase.

    What a step adds is taken over when the step is made: until then a gradient scaler may still call it off.

    Args:
        units: How the units lie in the weight.
        power: Power of the gradients that is added up; None where nothing is gathered.

    Attributes:
        total: The sums, `[units]`, fp64; of single entries fp32, and the shape of the weight. None before the first.
        pending: What the passes of the coming step add.
    """

    def __init__(self, units: Units, power: int | None) -> None:
        self.units = units
        self.power = power
        self.total: torch.Tensor | None = None
        self.pending: torch.Tensor | None = None
        spread = [axis for axis, length in enumerate(units.inner, 1) if length != 1]
        self._per_entry = units.size == 1
        self._reduced = [axis for axis in range(len(units.shape)) if axis not in spread and (axis or units.lead > 1)]

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return self.total is None

    @torch.no_grad()
    def add(self, gradient: torch.Tensor) -> None:
        """Add what a pass brings.

        Args:
            gradient: G of the whole weight, its shape, any floating dtype.
        """
        if self.power is None:
            return
        wide = gradient if gradient.dtype is torch.float64 else gradient.float()
        wide = wide.square() if self.power == 2 else wide.abs()
        part = wide if self._per_entry else wide.sum(self._reduced, dtype=torch.float64).view(-1)
        self.pending = part if self.pending is None else self.pending.add_(part)

    def fold(self, scale: float) -> None:
        """Take over what the passes of a step have added.

        Args:
            scale: Factor that a gradient scaler has left in the gradients.
        """
        if self.pending is None:
            return
        part = self.pending if scale == 1.0 else self.pending.mul_(scale ** -(self.power or 0))
        self.total = part if self.total is None else self.total.add_(part)
        self.pending = None

    def drop(self) -> None:
        """Forget what the passes of a step have added."""
        self.pending = None

    def state(self, weight: ObservedWeight, *, ends: bool) -> State:
        """Return the sums."""
        return State(whole={} if self.total is None else {"total": self.total})

    def load(self, saved: SavedState, device: torch.device) -> UnitSums:
        """Return the sums that a saved state holds."""
        read = UnitSums(self.units, self.power)
        if "total" in saved:
            shape = self.units.shape if self._per_entry else (self.units.count,)
            dtypes = (torch.float32, torch.float64) if self._per_entry else (torch.float64,)
            read.total = saved.amounts("total", shape, *dtypes).to(device, copy=True)
        return read
