"""Granularities: what is selected as a whole."""

from __future__ import annotations

import re
from typing import ClassVar

import torch

from peft_dps.errors import ConfigError, TargetError
from peft_dps.masking.compact.delta import Delta, EntryDelta, slot_axis
from peft_dps.masking.compact.tiles import TileDelta
from peft_dps.masking.compact.whole import WholeDelta
from peft_dps.tensors.layout import TILE_SIDE, Layout, Units
from peft_dps.tensors.registry import Registry

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")  # up to the first number in a path: a layer of the model


class Granularity:
    """Units of one entry.

    A subclass says `units`, and `owner` if weights share units.

    Args:
        reduction: Whether the score of a unit is the "mean" of its entries' scores or their "sum".

    Attributes:
        per_entry: Whether units are single entries, which are too many to be handled but by their masks.
        spans_weights: Whether a unit is a whole weight or more, so that it has to be chosen among several weights.
        spans_layers: Whether a unit is all of a layer of the model.
    """

    per_entry: ClassVar[bool] = False
    spans_weights: ClassVar[bool] = False
    spans_layers: ClassVar[bool] = False
    _delta: ClassVar[type[Delta]] = Delta

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}.")
        self.reduction = reduction

    @property
    def adds_to_output(self) -> bool:
        """Whether layers can compute with the units alone, and add that to what the base layer returns."""
        return self._delta.adds_to_output

    def units(self, layout: Layout) -> Units | None:
        """Return how the units lie in a weight; None where nothing tells."""
        raise NotImplementedError

    def owner(self, name: str) -> str:
        """Return what the units belong to: weights with the same owner share theirs."""
        return name

    def delta(self, layout: Layout, slots: int, like: torch.Tensor) -> Delta:
        """Make what holds the selected units of a weight in compact storage.

        Args:
            layout: Of the weight.
            slots: Number of units; 0 if that is known at the selection only.
            like: Tensor of the dtype and device that the values are to have.

        Raises:
            TargetError: If nothing tells how the units lie in the weight.
        """
        units = self.units(layout)
        if units is None:
            raise TargetError(
                f"Nothing tells where the rows and columns of a weight of shape {layout.shape} are. Use "
                "`granularity='entry'`, or leave it out of the targets."
            )
        made = TileDelta if self._delta is Delta and slot_axis(units) < 0 else self._delta
        return made(units, slots, like)

    def reduce(self, sums: torch.Tensor, size: int) -> torch.Tensor:
        """Return the scores of units.

        Args:
            sums: What the scores of their entries add up to, `[units]`, fp64.
            size: Entries of a unit.
        """
        return sums / size if self.reduction == "mean" else sums


GRANULARITIES: Registry[type[Granularity]] = Registry("granularity")


@GRANULARITIES.register("entry")
class Entry(Granularity):
    """One scalar of a weight."""

    per_entry = True
    _delta = EntryDelta

    def units(self, layout: Layout) -> Units:
        """Return each entry as a unit."""
        return layout.entries


@GRANULARITIES.register("row")
class Row(Granularity):
    """All that makes one output; one token of an embedding."""

    def units(self, layout: Layout) -> Units | None:
        """Return the rows."""
        return layout.rows


@GRANULARITIES.register("column")
class Column(Granularity):
    """All that takes one input; one input channel of a convolution, one dimension of an embedding."""

    def units(self, layout: Layout) -> Units | None:
        """Return the columns."""
        return layout.columns


@GRANULARITIES.register("submatrix")
class Submatrix(Granularity):
    """A tile of a matrix, of 256 rows and 256 columns (SMT, arXiv:2405.15525).

    Where 256 does not divide a side, a tile is as long as the largest number up to 256 that does, so that all tiles of
    a weight are of one size. A subclass with another `side`, registered by a name of its own, cuts smaller ones.

    Attributes:
        side: Largest number of rows and of columns of a tile.
    """

    side: ClassVar[int] = TILE_SIDE
    _delta = TileDelta

    def units(self, layout: Layout) -> Units | None:
        """Return the tiles."""
        return layout.tiles(self.side)


@GRANULARITIES.register("tensor")
class Tensor(Granularity):
    """One weight."""

    spans_weights = True
    _delta = WholeDelta

    def units(self, layout: Layout) -> Units:
        """Return the weight as one unit."""
        return layout.whole


@GRANULARITIES.register("block")
class Block(Tensor):
    """All targets of one layer of the model; a target outside of the numbered layers is a block by itself."""

    spans_layers = True

    def owner(self, name: str) -> str:
        """Return the path of the numbered layer that the weight is in."""
        return layer_of(name) or name


def layer_of(name: str) -> str | None:
    """Return the path of the numbered layer of the model that a weight is in; None outside of them."""
    found = _LAYER.match(name)
    return None if found is None else found[0]
