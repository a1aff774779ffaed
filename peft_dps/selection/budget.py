"""Budgets: how many units a subnetwork holds, and which of those that are ranked together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from peft_dps.errors import ConfigError
from peft_dps.selection.backward_flops import best_within_flops
from peft_dps.selection.topk import SortableScores, select, select_within
from peft_dps.tensors.registry import Registry


@dataclass(frozen=True)
class Candidates:
    """Units to choose from: those of a weight, or of several that share theirs.

    Attributes:
        scores: Their scores.
        sizes: Entries of a unit in each of the weights, in the order of the model's modules.
    """

    scores: SortableScores
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of units."""
        return self.scores.bits.numel()

    @property
    def size(self) -> int:
        """Entries of a unit."""
        return sum(self.sizes)


Problem = Sequence[Candidates]  # what is ranked together


class Budget(Protocol):
    """How much may be selected.

    Attributes:
        whole_weights: Whether it is for units that are whole weights or more.
        in_flops: Whether it counts FLOPs of the backward pass, which only a choice over the whole model can tell.
    """

    whole_weights: ClassVar[bool]
    in_flops: ClassVar[bool]

    @property
    def takes_all(self) -> bool:
        """Whether everything is selected, so that nothing has to be masked."""

    def count(self, units: int) -> int:
        """Return how many units are selected of so many alike."""

    def choose(self, problems: Sequence[Problem], besides: int = 0) -> list[list[torch.Tensor]]:
        """Choose units.

        Args:
            problems: What is ranked together, for each choice.
            besides: Entries that are trained besides the selection, whatever it is.

        Returns:
            For all candidates of each problem a bool mask of their units, True where chosen.

        Raises:
            ConfigError: If the budget is too low for any unit.
        """

    def most_held(self, units: int) -> int | None:
        """Return of how many units of a weight a compact adapter may hold values; None for any number."""


class EntryBudget:
    """Counts entries: `density` is the fraction of them that a subnetwork holds, with what is trained besides it.

    The best are taken until their entries reach the fraction, so the last one may exceed it.

    Args:
        density: Fraction to select, in (0, 1].
        max_density: Fraction of the units of a weight that a compact adapter may hold; None for all.

    Raises:
        ConfigError: If one is out of range.
    """

    whole_weights: ClassVar[bool] = False
    in_flops: ClassVar[bool] = False

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

    def choose(self, problems: Sequence[Problem], besides: int = 0) -> list[list[torch.Tensor]]:
        """Choose units of each problem by itself; see `Budget.choose`."""
        return [self._choose(problem, besides) for problem in problems]

    def _choose(self, problem: Problem, besides: int) -> list[torch.Tensor]:
        scores = [each.scores for each in problem]
        if len(problem) == 1 and not besides:
            return select(scores, self.count(problem[0].count))
        total = sum(each.count * each.size for each in problem) + besides
        limit = self.count(total) - besides
        if limit <= 0:
            raise ConfigError(
                f"`density={self.density}` is {self.count(total)} of the {total} entries that could be trained, and "
                f"{besides} are trained besides the selection (biases with `train_bias`, `modules_to_save`, "
                "`train_remaining`), so nothing can be selected. Raise `density`, give a number of `units`, or train "
                "less besides."
            )
        return select_within(scores, [each.size for each in problem], limit)

    def most_held(self, units: int) -> int | None:
        """Return ceil(units * max_density)."""
        return None if self.max_density is None else min(units, math.ceil(units * self.max_density))


class UnitBudget(EntryBudget):
    """Counts units: so many of each problem are selected, whatever their size.

    Those of a weight are rows or columns, as many as a LoRA of that rank has; those of a model are weights or blocks.

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
        """Return the number of units, of however many.

        Raises:
            ConfigError: If it has fewer.
        """
        if units < self.units:
            raise ConfigError(
                f"`units` is {self.units}, and a weight has only {units} of them (the model, of weights and blocks). "
                "Use at most as many as the smallest target has, leave that out with `exclude_modules`, or give a "
                "`density`."
            )
        most = self.most_held(units)
        if most is not None and most < self.units:
            raise ConfigError(
                f"`units` is {self.units}, and `max_density={self.max_density}` lets an adapter hold {most} of "
                f"{units} units of a weight. Raise it, or use fewer units."
            )
        return self.units

    def _choose(self, problem: Problem, besides: int) -> list[torch.Tensor]:
        return select([each.scores for each in problem], self.count(sum(each.count for each in problem)))


class ShareBudget(EntryBudget):
    """Counts weights or blocks: `density` is the fraction of them that is selected, whatever their size.

    Of each problem as many are selected as that makes, rounded down; what is left over all of them goes to those whose
    next unit scores best, one each. So of three weights in each of many layers half is two in one half of the layers,
    and one in the others, as in HFT (arXiv:2404.18466).
    """

    whole_weights = True

    def choose(self, problems: Sequence[Problem], besides: int = 0) -> list[list[torch.Tensor]]:
        """Choose units of all problems; see `Budget.choose`."""
        numbers = [sum(each.count for each in problem) for problem in problems]
        exact = [number * self.density for number in numbers]
        counts = [math.floor(share) for share in exact]
        uneven = [index for index, count in enumerate(counts) if exact[index] > count]
        following = {index: self._score_after(problems[index], counts[index]) for index in uneven}
        uneven.sort(key=following.__getitem__, reverse=True)
        for index in uneven[: self.count(sum(numbers)) - sum(counts)]:
            counts[index] += 1
        return [
            select([each.scores for each in problem], count) for problem, count in zip(problems, counts, strict=True)
        ]

    def _score_after(self, problem: Problem, count: int) -> int:
        """Return the bits of the best score after so many."""
        return int(torch.cat([each.scores.bits.cpu() for each in problem]).sort(descending=True).values[count])


class FlopsBudget(EntryBudget):
    """Counts FLOPs: `density` is the fraction of those of a backward pass through all targets (arXiv:2309.13192).

    The units with the highest sum of scores are chosen; see `best_within_flops`.
    """

    whole_weights = True
    in_flops = True

    def _choose(self, problem: Problem, besides: int) -> list[torch.Tensor]:
        total = 2 * sum(each.size for each in problem)
        scores = [float(each.scores.values) for each in problem]
        chosen = best_within_flops(scores, [each.sizes for each in problem], self.count(total))
        if chosen is None:
            raise ConfigError(
                f"`density={self.density}` of the FLOPs of the backward pass (`budget='flops'`) is too little to "
                f"train any of the {len(problem)} units, even the last one. Raise `density`, or use "
                "`granularity='tensor'`."
            )
        return [
            torch.full(each.scores.shape, one, dtype=torch.bool, device=each.scores.bits.device)
            for each, one in zip(problem, chosen, strict=True)
        ]


BUDGETS: Registry[Callable[[Any, Any, Any], Budget]] = Registry("budget")


@BUDGETS.register("entries")
def _entries(density: Any, units: Any, max_density: Any) -> Budget:
    return EntryBudget(density, max_density) if units is None else UnitBudget(units, max_density)


@BUDGETS.register("units")
def _units(density: Any, units: Any, max_density: Any) -> Budget:
    return ShareBudget(density, max_density) if units is None else UnitBudget(units, max_density)


@BUDGETS.register("flops")
def _flops(density: Any, units: Any, max_density: Any) -> Budget:
    if units is not None:
        raise ConfigError(f"`units={units!r}` counts units, and `budget` is 'flops'. Give a `density`.")
    return FlopsBudget(density, max_density)


def _fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ConfigError(f"`{name}` must be in (0, 1], got {value!r}.")
    return value
