"""Budgets and scopes: how many units a subnetwork holds, and among which the best are chosen."""

from __future__ import annotations

import math
from typing import Any, Protocol

from peft_dps.errors import ConfigError
from peft_dps.tensors.registry import Registry


class Budget(Protocol):
    """How much may be selected."""

    @property
    def takes_all(self) -> bool:
        """Whether everything is selected, so that nothing has to be masked."""

    def count(self, units: int) -> int:
        """Return how many units are selected of so many alike."""

    def cost(self, entries: int) -> int:
        """Return what a unit of so many entries costs."""

    def limit(self, total: int) -> float:
        """Return what the selected units may cost, of units that cost so much in total."""


class EntryBudget:
    """Counts entries: `density` is the fraction of them that a subnetwork holds.

    Args:
        density: Fraction to select, in (0, 1].

    Raises:
        ConfigError: If the density is out of range.
    """

    def __init__(self, density: Any) -> None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
            raise ConfigError(f"`density` must be in (0, 1], got {density!r}.")
        self.density: float = density

    @property
    def takes_all(self) -> bool:
        """Whether the density is 1."""
        return self.density == 1.0

    def count(self, units: int) -> int:
        """Return ceil(units * density)."""
        return min(units, math.ceil(units * self.density))

    def cost(self, entries: int) -> int:
        """Return the number of entries."""
        return entries

    def limit(self, total: int) -> float:
        """Return ceil(total * density)."""
        return self.count(total)


class Scope:
    """The best are chosen within each weight.

    Attributes:
        across: Whether weights are ranked together.
    """

    across = False

    def problems(self, weights: int) -> list[list[int]]:
        """Return which of so many weights are ranked together, by their indices."""
        return [[index] for index in range(weights)]


SCOPES: Registry[type[Scope]] = Registry("scope")
SCOPES.register("tensor")(Scope)


@SCOPES.register("model")
class ModelScope(Scope):
    """The best are chosen over all weights together."""

    across = True

    def problems(self, weights: int) -> list[list[int]]:
        """Return all of them as one problem."""
        return [list(range(weights))] if weights else []
