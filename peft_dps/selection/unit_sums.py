"""Evidence in compact storage: sums over the entries of each unit, gathered in the backward pass of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_dps.masking.compact.delta import slot_axis
from peft_dps.selection.evidence import Gathered, ObservedWeight
from peft_dps.tensors.layout import Units
from peft_dps.tensors.processes import Ranks
from peft_dps.tensors.saved_state import SavedState, State
from peft_dps.tensors.split import Split, embedded


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
        self._per_entry = units.size == 1
        self._shape = units.shape if self._per_entry else (units.count,)
        self._spanned = list(range(len(units.shape), 2 * len(units.shape)))

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return self.total is None

    @torch.no_grad()
    def add(self, gradient: torch.Tensor, split: Split | None = None) -> torch.Tensor | None:
        """Add what a pass brings.

        Args:
            gradient: G of the whole weight, its shape, any floating dtype.
            split: Which part of it that is, of rows or columns, where it is not the whole.

        Returns:
            0, or NaN if G is not finite; None if nothing is gathered.
        """
        if self.power is None:
            return None
        wide = gradient if gradient.dtype is torch.float64 else gradient.float()
        wide = wide.square() if self.power == 2 else wide.abs()
        if split is not None:
            part = self._sums_of_part(wide, split)
        else:
            part = wide if self._per_entry else self.units.split(wide).sum(self._spanned).view(-1).double()
        self.pending = part if self.pending is None else self.pending.add_(part)
        return part.sum(dtype=torch.float64) * 0.0

    def _sums_of_part(self, part: torch.Tensor, split: Split) -> torch.Tensor:
        """Return the sums of rows or columns over the entries that this process has; those of all add up."""
        along = slot_axis(self.units)
        sums = part.sum(1 - along, dtype=None if self._per_entry else torch.float64)
        sums = embedded(sums, 0, split.here, self.units.count) if along == split.axis else sums
        return sums.view(self._shape)

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

    def zeros(self, device: torch.device) -> torch.Tensor:
        """Return sums of nothing."""
        dtype = torch.float32 if self._per_entry else torch.float64
        return torch.zeros(self._shape, dtype=dtype, device=device)

    def add_up(self, weight: ObservedWeight, ranks: Ranks) -> None:
        """Add up the sums of all processes; see `Gathered.add_up`."""
        if self.power is not None:
            total = self.zeros(ranks.device) if self.total is None else self.total
            self.total = total.copy_(ranks.sum(total.double()))

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
            dtypes = (torch.float32, torch.float64) if self._per_entry else (torch.float64,)
            read.total = saved.amounts("total", self._shape, *dtypes).to(device, copy=True)
        return read


@torch.no_grad()
def add_up(every: Sequence[UnitSums], ranks: Ranks | None, counts: Sequence[bool]) -> list[UnitSums]:
    """Add up over all processes what the passes of a step have added. All of them have to call it.

    Args:
        every: The sums of all weights.
        ranks: The processes; None if there is one only.
        counts: Whether those of this process count: not if another one has the same.

    Returns:
        Those that have something to add, on any process.
    """
    if ranks is None:
        return [sums for sums in every if sums.pending is not None]
    here = torch.tensor([sums.pending is not None for sums in every], dtype=torch.int32, device=ranks.device)
    seen = [sums for sums, some in zip(every, ranks.sum(here).tolist(), strict=True) if some]
    counted = {id(sums) for sums, own in zip(every, counts, strict=True) if own}
    own = [
        sums.zeros(ranks.device) if sums.pending is None or id(sums) not in counted else sums.pending for sums in seen
    ]
    total = ranks.sum(torch.cat([part.view(-1).double() for part in own]))
    for sums, part, whole in zip(seen, own, total.split([part.numel() for part in own]), strict=True):
        sums.pending = part.copy_(whole.view(part.shape))
    return seen
