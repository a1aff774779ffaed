"""What an object holds for an exact resume, and how it is read back and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_dps.errors import StateError


@dataclass
class State:
    """What an object holds for an exact resume.

    Attributes:
        facts: Plain values, fit for JSON. Of a weight that is cut over processes, True on one counts for all.
        tensors: Tensors with as many rows as the weight, which are cut with it. They are those in use: copy what has
            to outlive the next step.
        whole: Tensors that are the same on all processes.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)

    def __or__(self, other: State) -> State:
        return State({**self.facts, **other.facts}, {**self.tensors, **other.tensors}, {**self.whole, **other.whole})


class SavedState:
    """A `State` that comes from elsewhere: nothing of it is taken unchecked.

    Args:
        whose: What errors call it.
        facts: Its plain values.
        tensors: Its tensors.
    """

    def __init__(self, whose: str, facts: Any, tensors: Mapping[str, Any]) -> None:
        self.whose = whose
        if not isinstance(facts, Mapping):
            raise self.damaged(f"it is {facts!r}, and has to be a table")
        self._facts = facts
        self._unread = set(facts)
        self._tensors = dict(tensors)

    def fact(self, name: str) -> Any:
        """Return a plain value, unchecked."""
        if name not in self._facts:
            raise self.damaged(f"it lacks {name!r}")
        self._unread.discard(name)
        return self._facts[name]

    def number(self, name: str, *, at_least: int = 0, optional: bool = False) -> Any:
        """Return a whole number."""
        value = self.fact(name)
        fits = (optional and value is None) or (type(value) is int and value >= at_least)
        return self._fitting(name, fits, f"a whole number of at least {at_least}")

    def share(self, name: str, *, positive: bool = False) -> float:
        """Return a number from 0 to 1."""
        value = self.fact(name)
        fits = type(value) in (int, float) and 0 <= value <= 1 and not (positive and value == 0)
        return float(self._fitting(name, fits, f"a number {'above' if positive else 'from'} 0 to 1"))

    def flag(self, name: str) -> bool:
        """Return True or False."""
        value: bool = self._fitting(name, isinstance(self.fact(name), bool), "True or False")
        return value

    def names(self, name: str) -> list[str]:
        """Return a list of names."""
        value = self.fact(name)
        fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return list(self._fitting(name, fits, "a list of names"))

    def facts(self, name: str) -> SavedState | None:
        """Return the plain values of a part, or None if there is none."""
        return None if self.fact(name) is None else self.part(name)

    def part(self, name: str) -> SavedState:
        """Return the plain values of a part."""
        return SavedState(f"{self.whose} (`{name}`)", self.table(name), {})

    def table(self, name: str) -> dict[str, Any]:
        """Return a dict of plain values, unchecked."""
        value: dict[str, Any] = self._fitting(name, isinstance(self.fact(name), dict), "a table")
        return value

    def _fitting(self, name: str, fits: bool, what: str) -> Any:
        if not fits:
            raise self.damaged(f"`{name}` is {self._facts[name]!r}, and has to be {what}")
        return self._facts[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, shape: torch.Size | tuple[int, ...], *dtypes: torch.dtype) -> torch.Tensor:
        """Take a tensor."""
        tensor = self._tensors.pop(name, None)
        if not isinstance(tensor, torch.Tensor):
            raise self.damaged(f"it lacks the tensor {name!r}")
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
            raise self.damaged(
                f"its tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, and has to be "
                f"{' or '.join(map(str, dtypes))} {list(shape)}"
            )
        return tensor

    def amounts(
        self, name: str, shape: torch.Size | tuple[int, ...], *dtypes: torch.dtype, at_most: float = math.inf
    ) -> torch.Tensor:
        """Take a tensor without NaN and negative numbers."""
        tensor = self.tensor(name, shape, *dtypes)
        if not bool(((tensor >= 0) & (tensor <= at_most)).all()):
            raise self.damaged(f"its tensor {name!r} has values that are negative, NaN or above {at_most}")
        return tensor

    def finish(self) -> None:
        """Make sure that every value was asked for, and every tensor taken."""
        if self._unread:
            raise self.damaged(f"it has values that nothing needs: {sorted(map(str, self._unread))}")
        if self._tensors:
            raise self.damaged(f"it has tensors that nothing needs: {sorted(map(str, self._tensors))}")

    def damaged(self, what: str) -> StateError:
        """Make the error that says what is wrong."""
        return StateError(f"The training state of {self.whose} is damaged: {what}.")
