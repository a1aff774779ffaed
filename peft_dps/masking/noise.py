"""Column noise of DPS Mix: which input columns take part in a step, from a generator of the adapter's own.

A bit depends on the seed, the weight, the step and the column, and on nothing else: it is made by integer
arithmetic alone, the same on every process, and no other use of random numbers changes it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_RESOLUTION_BITS = 53
_WORD = 1 << 64


@dataclass(frozen=True)
class Columns:
    """How columns lie in a weight: a column spans the axes over which a row with a number per column broadcasts.

    Attributes:
        row_shape: Shape that a row takes to broadcast over the weight, 1 in the axes that a column spans; with groups,
            over the weight with its first axis unfolded to `[groups, out / groups]`.
        groups: Number of groups of a convolution, each of which has columns of its own.
    """

    row_shape: tuple[int, ...]
    groups: int = 1

    @property
    def count(self) -> int:
        """Number of columns."""
        return math.prod(self.row_shape)

    def spread(self, row: torch.Tensor) -> torch.Tensor:
        """Shape a row `[count]` so that it broadcasts over `unfold(weight)`."""
        return row.view(self.row_shape)

    def unfold(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the weight's shape so that a spread row broadcasts over it."""
        return unfold_groups(tensor, self.groups)


def unfold_groups(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """View the first axis of a convolution's weight as `[groups, out / groups]`, if there is more than one group."""
    return tensor if groups == 1 else tensor.unflatten(0, (groups, -1))


class ColumnNoise:
    """Draws, for each step, one row of 0 and 1 per weight: P(1) = density, independent over columns.

    Args:
        seed: Seed of the method's own random numbers.
        columns: Number of input columns of each weight.
        density: Probability that a column takes part, in (0, 1].
    """

    def __init__(self, seed: int, columns: Sequence[int], density: float) -> None:
        self.seed = seed
        self.columns = list(columns)
        self.density = density
        self.threshold = int(density * (1 << _RESOLUTION_BITS))
        self._counters: dict[torch.device, torch.Tensor] = {}

    def draw(self, step: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Draw the rows of one step.

        Args:
            step: Number of the step.
            device: Where to make them.

        Returns:
            Per weight, a bool row `[in]`, True where the column takes part.
        """
        if device not in self._counters:
            self._counters[device] = self._make_counters().to(device)
        words = self._counters[device] ^ _word(f"{self.seed}/step {step}")
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0x9E3779B97F4A7C15)):
            words = (words ^ _shift_right(words, shift)) * _signed(factor)
        uniform = _shift_right(words, 64 - _RESOLUTION_BITS)
        rows: tuple[torch.Tensor, ...] = (uniform < self.threshold).split(self.columns)
        return rows

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_counters": {}}

    def _make_counters(self) -> torch.Tensor:
        """Give every column of every weight a 64-bit word of its own."""
        odd = _signed(0xD1342543DE82EF95)
        return torch.cat(
            [
                torch.arange(count, dtype=torch.int64) * odd + _word(f"{self.seed}/weight {index}")
                for index, count in enumerate(self.columns)
            ]
        )


def _word(text: str) -> int:
    return _signed(random.Random(f"peft_dps/noise/{text}").getrandbits(64))


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD >> 1 else word


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift without the sign, which torch's shift of int64 would copy."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
