"""Budgets and scopes: how many units a subnetwork holds, and among which the best are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
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

    def most_held(self, units: int) -> int | None:
        """Return of how many units of a weight a compact adapter may hold values; None for any number."""


class EntryBudget:
    """Counts entries: `density` is the fraction of them that a subnetwork holds.

    Args:
        density: Fraction to select, in (0, 1].
        max_density: Fraction of the units of a weight that a compact adapter may hold; None for all.

    Raises:
        ConfigError: If one is out of range.
    """

    def __init__(self, density: Any, max_density: Any = None) -> None:
        self.density: float = _fraction("density", density)
        self.max_density: float | None = None if max_density is None else _fraction("max_density", max_density)
        if self.max_density is not None and self.max_density < self.density:
            raise ConfigError(
                f"`max_density` must be at least `density`, got {max_density!r} and {density!r}: what is trained is "
                "held."
            )

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

    def most_held(self, units: int) -> int | None:
        """Return ceil(units * max_density)."""
        return None if self.max_density is None else min(units, math.ceil(units * self.max_density))


class UnitBudget(EntryBudget):
    """Counts rows or columns: `units` of each weight are selected, as many as a LoRA of that rank has.

    Args:
        units: How many.
        max_density: See `EntryBudget`.

    Raises:
        ConfigError: If one is out of range.
    """

    takes_all = False

    def __init__(self, units: Any, max_density: Any = None) -> None:
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise ConfigError(f"`units` must be an integer of at least 1, got {units!r}.")
        self.units = units
        self.max_density = None if max_density is None else _fraction("max_density", max_density)

    def count(self, units: int) -> int:
        """Return the number of units, whatever a weight has.

        Raises:
            ConfigError: If it has fewer.
        """
        if units < self.units:
            raise ConfigError(
                f"`units` is {self.units}, and a weight has only {units} of them. Use at most as many as the smallest "
                "target has, leave that out with `exclude_modules`, or give a `density`."
            )
        most = self.most_held(units)
        if most is not None and most < self.units:
            raise ConfigError(
                f"`units` is {self.units}, and `max_density={self.max_density}` lets an adapter hold {most} of "
                f"{units} units of a weight. Raise it, or use fewer units."
            )
        return self.units


BUDGETS: Registry[Callable[[Any, Any, Any], Budget]] = Registry("budget")


@BUDGETS.register("entries")
def _entries(density: Any, units: Any, max_density: Any) -> Budget:
    return EntryBudget(density, max_density) if units is None else UnitBudget(units, max_density)


def _fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ConfigError(f"`{name}` must be in (0, 1], got {value!r}.")
    return value


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
