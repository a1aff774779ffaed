"""A weight of which a compact adapter holds all or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from peft_dps.masking.compact.delta import NONE, Delta, LoadBase, set_values


class WholeDelta(Delta):
    """A weight that is selected as a whole. `weight` is then a copy of it that is trained, and is empty until then."""

    is_slices = adds_to_output = False

    def shape_of(self, slots: int) -> tuple[int, ...]:
        """Return the shape of the weight, or one without entries."""
        return (self.units.shape[0] * slots, *self.units.shape[1:])

    def _axis(self) -> int:
        return 0

    @torch.no_grad()
    def take(self, numbers: torch.Tensor, load_base: LoadBase) -> None:
        """Begin with a copy of the weight, if it is selected."""
        super().take(numbers, load_base)
        if self.slots:
            set_values(self.weight, self._copied(load_base))

    @torch.no_grad()
    def exchange(
        self, numbers: torch.Tensor, load_base: LoadBase, write: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """Train the weight from now on, or no more; see `Delta.exchange`."""
        if len(numbers) == self.slots:
            return torch.zeros_like(numbers)
        if self.slots:
            self.keep(self.weight.detach(), self.index)
            write(self.weight.new_zeros(self.shape_of(0)))
        else:
            write(self._copied(load_base) if self.kept is None else self.kept[0])
            self.keep(self.weight.detach()[:0], numbers[:0])
        self.index = numbers.clone()
        return torch.full_like(numbers, NONE)

    @torch.no_grad()
    def combine(self, terms: Sequence[tuple[Delta, float]], load_base: LoadBase) -> None:
        """Hold W0 and the weighted sum of what others add to it; see `Delta.combine`."""
        known = [(delta, factor) for delta, factor in terms if delta.is_selected]
        parts = [(own, factor) for delta, factor in known for own, _ in delta.parts()]
        if known:
            trained = any(delta.slots for delta, _ in known)
            self.resize(int(trained))
            self.index.zero_()
            self.is_selected = True
            if parts:
                # As (1 - sum w_i) W0 + sum w_i W_i, one with factor 1 comes out to the bit.
                total = (1.0 - math.fsum(factor for _, factor in parts)) * load_base().to(self.weight)
                for own, factor in parts:
                    total += factor * own.to(total)
                if trained:
                    set_values(self.weight, total)
                else:
                    self.keep(total, self.index.new_zeros(1))

    def _copied(self, load_base: LoadBase) -> torch.Tensor:
        return load_base().to(self.weight, copy=True)

    def dense(self, base_weight: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the weight; see `Delta.dense`."""
        weight = self.applied(base_weight)
        return weight - base_weight.to(weight.dtype)

    def applied(self, base_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as the adapter has it; see `Delta.applied`."""
        parts = self.parts()
        return parts[0][0] if parts else base_weight
