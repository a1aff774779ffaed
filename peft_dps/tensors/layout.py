"""How the rows and columns of a layer lie in its weight, whole or cut over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from peft_dps.errors import ConfigError

_CHUNK = 1 << 18  # entries that are widened to fp64 at once
TILE_SIDE = 256  # arXiv:2405.15525


@dataclass(frozen=True)
class Units:
    """Parts of equal size that a weight falls into.

    A unit spans neighbouring indices of each axis: two entries are of one unit if their indices along each axis,
    divided by how many of them a unit spans, are equal. Units are numbered in row-major order.

    Attributes:
        shape: Shape of the whole weight.
        lead: How many indices of the first axis a unit spans.
        inner: Per further axis, how many units follow each other along it: 1 where a unit spans it.

    Raises:
        ConfigError: If that does not cut the weight into parts of equal size.
    """

    shape: tuple[int, ...]
    lead: int
    inner: tuple[int, ...]

    def __post_init__(self) -> None:
        fits = len(self.inner) == len(self.shape) - 1 and all(
            units >= 1 and length % units == 0 for units, length in zip(self.inner, self.shape[1:], strict=True)
        )
        if not fits or self.lead < 1 or self.shape[0] % self.lead:
            raise ConfigError(
                f"A weight of shape {self.shape} cannot be cut into equal units of {self.lead} rows with {self.inner} "
                "along the other axes. Let `granularity` return units that fit, or leave the weight out."
            )

    @property
    def count(self) -> int:
        """Number of units."""
        return self._leads * math.prod(self.inner)

    @property
    def size(self) -> int:
        """Entries of a unit."""
        return math.prod(self.shape) // self.count

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of units along each axis."""
        return (self._leads, *self.inner)

    @property
    def span(self) -> tuple[int, ...]:
        """Number of indices of each axis that a unit spans."""
        return tuple(length // units for length, units in zip(self.shape, self.grid, strict=True))

    @property
    def _leads(self) -> int:
        return self.shape[0] // self.lead

    def split(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of a weight as its units, `[*grid, *span]`."""
        cut = weight
        for axis, sizes in reversed(list(enumerate(zip(self.grid, self.span, strict=True)))):
            cut = cut.unflatten(axis, sizes)
        axes = range(len(self.shape))
        return cut.permute([2 * axis for axis in axes] + [2 * axis + 1 for axis in axes])

    def join(self, units: torch.Tensor) -> torch.Tensor:
        """Put a weight together from all of its units, `[count, *span]`."""
        axes = range(len(self.shape))
        apart = units.view(*self.grid, *self.span)
        return apart.permute([place for axis in axes for place in (axis, len(self.shape) + axis)]).reshape(self.shape)

    def sums(self, part: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Add up the entries of each unit, in one order on every device and in every run.

        Args:
            part: The weight's entries, or some rows of them, `[rows, *shape[1:]]`.
            first: The first of these rows.

        Returns:
            `[count]`, fp64, 0 for units of which the part has nothing. Those of all parts add up to the whole's.
        """
        total = part.new_zeros((self._leads, *self.inner), dtype=torch.float64)
        spans = [
            (axis, sizes) for axis, sizes in enumerate(zip(self.grid, self.span, strict=True)) if axis and sizes[1] > 1
        ]
        added = [axis + place for place, (axis, _) in enumerate(spans, 1)]
        rows, row = part.shape[0], 0
        step = max(1, _CHUNK // max(1, math.prod(self.shape[1:])))
        while row < rows:
            lead, into = divmod(first + row, self.lead)
            stop = min(rows, row + (step if self.lead == 1 else min(step, self.lead - into)))
            piece = part[row:stop].to(torch.float64)
            for axis, sizes in reversed(spans):
                piece = piece.unflatten(axis, sizes)
            piece = piece.sum(added) if spans else piece
            if self.lead == 1:
                total[first + row : first + stop] = piece
            else:
                total[lead] += piece.sum(0)
            row = stop
        return total.view(-1)

    def spread(self, values: torch.Tensor, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """Shape a number for each unit so that it broadcasts over the weight, or over some rows of it.

        Args:
            values: `[count]`.
            first: The first row.
            rows: Number of rows; None for all from the first on.
        """
        leads = values.view(self.grid)
        for axis, (units, span) in enumerate(zip(self.inner, self.span[1:], strict=True), 1):
            leads = leads.repeat_interleave(span, axis) if units > 1 and span > 1 else leads
        rows = self.shape[0] - first if rows is None else rows
        if self._leads == 1:
            return leads
        if self.lead == 1:
            return leads.narrow(0, first, rows)
        return leads[torch.arange(first, first + rows, device=values.device) // self.lead]

    def expand(self, values: torch.Tensor, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """Give each entry the value of its unit: a new tensor `[rows, *shape[1:]]`, of the arguments of `spread`."""
        rows = self.shape[0] - first if rows is None else rows
        spread = self.spread(values, first, rows).expand(rows, *self.shape[1:])
        return spread.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Layout:
    """What a layer takes for the rows and columns of its weight.

    Attributes:
        shape: Shape of the whole weight.
        rows: A row is all that makes one output (or one token, of an embedding); None where nothing tells.
        columns: A column is all that takes one input (or one dimension, of an embedding); None where nothing tells.
    """

    shape: tuple[int, ...]
    rows: Units | None
    columns: Units | None

    @property
    def whole(self) -> Units:
        """The weight as one unit."""
        return Units(self.shape, self.shape[0], (1,) * (len(self.shape) - 1))

    def tiles(self, side: int = TILE_SIDE) -> Units | None:
        """Return the tiles of so many rows and columns, fewer where that does not divide them.

        A tile has as many rows as the largest number up to `side` that divides the number of rows, and as many columns
        likewise. Each expert and each group of a convolution has tiles of its own. None where nothing tells rows and
        columns apart.
        """
        if self.rows is None or self.columns is None:
            return None
        grid = []
        for fine, coarse in ((max(pair), min(pair)) for pair in zip(self.rows.grid, self.columns.grid, strict=True)):
            length = fine // coarse  # of the axis in one expert or group, if rows or columns differ along it
            grid.append(fine // max(size for size in range(1, min(side, length) + 1) if length % size == 0))
        return Units(self.shape, self.shape[0] // grid[0], tuple(grid[1:]))

    @property
    def entries(self) -> Units:
        """Each entry as a unit."""
        return Units(self.shape, 1, self.shape[1:])


def out_in(shape: tuple[int, ...], groups: int = 1) -> Layout:
    """Lay out a weight `[out, in / groups, *kernel]`: of a linear layer, a convolution, or an embedding."""
    span = (1,) * (len(shape) - 2)
    return Layout(shape, Units(shape, 1, (1, *span)), Units(shape, shape[0] // groups, (shape[1], *span)))


def in_out(shape: tuple[int, ...]) -> Layout:
    """Lay out a weight `[in, out]`."""
    turned = out_in(shape)
    return Layout(shape, turned.columns, turned.rows)


def experts(shape: tuple[int, ...], *, transposed: bool) -> Layout:
    """Lay out a weight `[experts, out, in]`, transposed `[experts, in, out]`: each has rows and columns of its own."""
    second, third = Units(shape, 1, (shape[1], 1)), Units(shape, 1, (1, shape[2]))
    return Layout(shape, third, second) if transposed else Layout(shape, second, third)
