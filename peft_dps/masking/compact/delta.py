"""What a compact adapter holds of one weight: values of the selected units alone, and which units they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dps.tensors.layout import Units

NONE = -1  # in place of the number of a unit, where none has been selected yet

Part = tuple[torch.Tensor, torch.Tensor]  # values of units, and their numbers
LoadBase = Callable[[], torch.Tensor]


class Delta(nn.Module):
    """What is added to the selected units of a weight: D, with a slot for each along one axis.

    Args:
        units: How the units lie in the weight.
        slots: Number of units that will be trained; 0 if that is known at the selection only.
        like: Tensor of the dtype and device that the values are to have.

    Attributes:
        weight: D: the trained values, in the layout of the base weight.
        index: Per slot, the number of its unit, `[slots]`, int32; -1 before the first selection.
        kept_weight: Values of units that were selected once and are not trained any more; None if there are none.
        kept_index: Their numbers, int32.
        is_selected: Whether units have been selected.
        observes: Whether training forwards have to ask what to do.
        is_slices: Whether units are slices of the weight along one axis.
        adds_to_output: Whether a layer can compute with the units alone, and add that to what its base layer returns.
    """

    is_slices: ClassVar[bool] = True
    adds_to_output: ClassVar[bool] = True
    weight: nn.Parameter
    index: torch.Tensor
    kept_weight: torch.Tensor | None
    kept_index: torch.Tensor | None

    def __init__(self, units: Units, slots: int, like: torch.Tensor) -> None:
        super().__init__()
        self.units = units
        self.axis = self._axis()
        self.is_selected = False
        self.observes = False
        self.weight = nn.Parameter(like.new_zeros(self.shape_of(slots)))
        self.register_buffer("index", torch.full((slots,), NONE, dtype=torch.int32, device=like.device))
        self.register_buffer("kept_weight", None)
        self.register_buffer("kept_index", None)

    def forward(self, compute: Callable[[Delta], torch.Tensor]) -> torch.Tensor:
        """Return what `compute` makes of it: an engine that cuts the values by modules has them whole meanwhile."""
        return compute(self)

    def _axis(self) -> int:
        return slot_axis(self.units)

    def shape_of(self, slots: int) -> tuple[int, ...]:
        """Return the shape of the values of so many units."""
        shape = list(self.units.shape)
        shape[self.axis] = slots
        return tuple(shape)

    @property
    def slots(self) -> int:
        """Number of units that are trained."""
        return self.index.numel()

    @property
    def waiting(self) -> nn.Parameter | None:
        """The parameter, if it waits for units; None otherwise."""
        return None if self.is_selected else self.weight

    @property
    def kept(self) -> Part | None:
        """The units that are not trained any more."""
        return None if self.kept_weight is None or self.kept_index is None else (self.kept_weight, self.kept_index)

    def parts(self) -> list[Part]:
        """Return the units that the adapter holds: those that are trained, and those that were."""
        trained: list[Part] = [(self.weight, self.index)] if self.is_selected and self.slots else []
        return trained if self.kept is None else [*trained, self.kept]

    @property
    def held(self) -> torch.Tensor:
        """Numbers of all units that the adapter holds."""
        return torch.cat([self.index[:0], *(numbers for _, numbers in self.parts())])

    def resize(self, slots: int, kept: int = 0) -> None:
        """Make room for other numbers of units, whose values are to come. The parameter stays the same object."""
        if slots != self.slots:
            set_values(self.weight, self.weight.new_zeros(self.shape_of(slots)))
            self.index = self.index.new_full((slots,), NONE)
        self.keep(self.weight.detach().new_zeros(self.shape_of(kept)), self.index.new_full((kept,), NONE))

    def keep(self, values: torch.Tensor, numbers: torch.Tensor) -> None:
        """Hold these values of units that are not trained any more, and of no others."""
        self.kept_weight, self.kept_index = (values, numbers) if numbers.numel() else (None, None)

    @torch.no_grad()
    def take(self, numbers: torch.Tensor, load_base: LoadBase) -> None:
        """Begin with units, before which none have been selected.

        Args:
            numbers: Theirs, ascending, int32.
            load_base: Returns W0.
        """
        if len(numbers) != self.slots:
            self.resize(len(numbers))
        self.index.copy_(numbers)
        self.is_selected = bool(self.slots)  # a weight of which nothing was selected is as one that waits

    @torch.no_grad()
    def perturb(self, load_base: LoadBase) -> None:
        """Select the first units, at least one, and give them random values; only for tests."""
        count = max(1, self.slots)
        self.take(torch.arange(count, dtype=torch.int32, device=self.index.device), load_base)
        self.weight.add_(torch.randn_like(self.weight), alpha=0.02)

    @torch.no_grad()
    def exchange(
        self, numbers: torch.Tensor, load_base: LoadBase, write: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """Train other units from now on. Those that stay keep their slots if as many are trained as before.

        New units start with what the adapter has learned of them before; the values of those that leave are kept.

        Args:
            numbers: Theirs, ascending, int32.
            load_base: Returns W0.
            write: Writes the values of all slots into the parameter.

        Returns:
            Per slot, the one that its unit had before, `[slots]`; -1 for a new unit.
        """
        before, values = self.index, self.values()
        slot_of = torch.full((self.units.count,), NONE, dtype=torch.int64, device=before.device)
        slot_of[before.long()] = torch.arange(len(before), device=before.device)
        arrived = numbers[slot_of[numbers.long()] < 0]
        stays = torch.isin(before, numbers)
        if len(numbers) == len(before):
            index, moved = before.clone(), torch.arange(len(before), device=before.device)
            index[~stays], moved[~stays] = arrived, NONE
        else:
            index = torch.cat([before[stays], arrived])
            moved = slot_of[index.long()]
        left = values.index_select(self.axis, (~stays).nonzero().view(-1)), before[~stays]
        parts = [(values, before)] if self.kept is None else [(values, before), self.kept]
        write(self._collected(parts, index))
        others = [left] if self.kept is None else [self.kept, left]
        kept = torch.cat([own for _, own in others])
        kept = kept[~torch.isin(kept, index)]
        self.keep(self._collected(others, kept), kept)
        self.index = index
        return moved

    def _collected(self, parts: list[Part], index: torch.Tensor) -> torch.Tensor:
        """Return the values of units, 0 where no part has them."""
        found = parts[0][0].new_zeros(self.shape_of(len(index)))
        place = torch.full((self.units.count,), NONE, dtype=torch.int64, device=index.device)
        place[index.long()] = torch.arange(len(index), device=index.device)
        for values, numbers in parts:
            at = place[numbers.long()]
            found.index_copy_(self.axis, at[at >= 0], values.index_select(self.axis, (at >= 0).nonzero().view(-1)))
        return found

    @torch.no_grad()
    def combine(self, terms: Sequence[tuple[Delta, float]], load_base: LoadBase) -> None:
        """Hold the weighted sum of what others add to the weight, for every unit that one of them holds.

        Units that one of them trains are trained, in its order, so that one with factor 1 comes out to the bit.

        Args:
            terms: The others, and their factors.
            load_base: Returns W0.
        """
        known = [(delta, factor) for delta, factor in terms if delta.is_selected]
        if not known:
            return
        parts = [(factor * own.to(self.weight), at) for delta, factor in known for own, at in delta.parts()]
        index = _union([delta.index for delta, _ in known])
        kept = _union([index[:0], *(delta.kept[1] for delta, _ in known if delta.kept is not None)])
        kept = kept[~torch.isin(kept, index)]
        self.resize(len(index))
        self.index.copy_(index)
        set_values(self.weight, self._summed(parts, index))
        self.keep(self._summed(parts, kept), kept)
        self.is_selected = True

    def _summed(self, parts: list[Part], index: torch.Tensor) -> torch.Tensor:
        """Return the sums of the values of units over all parts."""
        total = self.weight.new_zeros(self.shape_of(len(index)))
        for part in parts:
            total += self._collected([part], index)
        return total

    def values(self) -> torch.Tensor:
        """Return the trained values as a whole, also where FSDP2 has cut them: all processes have to call it."""
        weight = self.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    def dense(self, base_weight: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the weight, in its shape; differentiable.

        Args:
            base_weight: W0.
        """
        whole = self.weight.new_zeros(self.units.shape)
        for values, numbers in self.parts():
            whole = whole.index_add(self.axis, numbers, values.to(whole.dtype))
        return whole

    def applied(self, base_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as the adapter has it, differentiable; W0 itself where nothing is added to it."""
        return base_weight.to(self.weight.dtype) + self.dense(base_weight) if self.parts() else base_weight

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        index, kept = state_dict.get(f"{prefix}index"), state_dict.get(f"{prefix}kept_index")
        if index is not None:
            self._make_room(len(index), 0 if kept is None else len(kept))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.see_selection()

    def _make_room(self, slots: int, kept: int) -> None:
        """Take the numbers of units that a state dict has: torch loads into tensors of the same shape only."""
        slots = self.slots if isinstance(self.weight, DTensor) else slots
        if (slots, kept) != (self.slots, 0 if self.kept_index is None else len(self.kept_index)):
            self.resize(slots, kept)

    def see_selection(self) -> None:
        """Take note of whether the index, which was loaded, names units."""
        known = self.index.device.type != "meta"
        self.is_selected = known and bool((self.index != NONE).all()) and (bool(self.slots) or self.kept is not None)


class EntryDelta(Delta):
    """What is added to the selected entries of a weight, which are numbered in row-major order."""

    is_slices = adds_to_output = False

    def shape_of(self, slots: int) -> tuple[int, ...]:
        """Return the shape of the values of so many entries."""
        return (slots,)

    def _axis(self) -> int:
        return 0

    def dense(self, base_weight: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the weight; see `Delta.dense`."""
        whole = self.weight.new_zeros(math.prod(self.units.shape))
        for values, numbers in self.parts():
            whole = whole.index_add(0, numbers, values.to(whole.dtype))
        return whole.view(self.units.shape)


def _union(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what is in one of the parts, once, in the order in which they have it."""
    union = parts[0]
    for part in parts[1:]:
        union = torch.cat([union, part[~torch.isin(part, union)]])
    return union


@torch.no_grad()
def set_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter values of perhaps another shape. It stays the object that its optimizer has."""
    if parameter.shape == values.shape:
        parameter.copy_(values)
        return
    parameter.grad = None
    # Autograd keeps the shape of what it last summed up gradients of, for as long as a loss lives; another dtype makes
    # it forget that.
    other = torch.float32 if parameter.dtype is not torch.float32 else torch.float64
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values.detach()


def slot_axis(units: Units) -> int:
    """Return the axis of a weight along which units are slices; -1 if they are none."""
    if units.lead == 1 and all(length == 1 for length in units.inner):
        return 0
    spread = [axis for axis, length in enumerate(units.inner, 1) if length > 1]
    single = [axis for axis, length in enumerate(units.shape) if length == 1]  # the only column of a weight
    along = spread or single
    return along[0] if units.lead == units.shape[0] and len(spread) <= 1 and along else -1
