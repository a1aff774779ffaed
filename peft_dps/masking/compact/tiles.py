"""Tiles of a weight: what a compact adapter holds of them, and what they add to the output of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.linear import Link, tapped, writable
from peft_dps.tensors.layout import Units

Tiles = tuple[torch.Tensor, Sequence[tuple[int, ...]]]  # values `[k, h, w]`, and per tile its first row and column


class TileDelta(Delta):
    """What is added to the selected units of a weight that are no slices of it; D is `[slots, *span]`."""

    is_slices = False

    def __init__(self, units: Units, slots: int, like: torch.Tensor) -> None:
        super().__init__(units, slots, like)
        # Of the units that were asked for last. It holds their tensors, so that no other has the place of one.
        self._known: list[tuple[torch.Tensor, int, list[tuple[int, ...]]]] = []

    def shape_of(self, slots: int) -> tuple[int, ...]:
        """Return the shape of the values of so many units."""
        return (slots, *self.units.span)

    def _axis(self) -> int:
        return 0

    def dense(self, base_weight: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the weight; see `Delta.dense`."""
        whole = self.weight.new_zeros((self.units.count, *self.units.span))
        for values, numbers in self.parts():
            whole = whole.index_add(0, numbers, values.to(whole.dtype))
        return self.units.join(whole)

    def corners(self, numbers: torch.Tensor) -> list[tuple[int, ...]]:
        """Return per unit the index of its first entry; read from the device once, until other units are selected."""
        for known, version, found in self._known:
            if known is numbers and version == numbers._version:
                return found
        places = torch.unravel_index(numbers.cpu().long(), self.units.grid)
        spans = zip(places, self.units.span, strict=True)
        found = list(zip(*((place * span).tolist() for place, span in spans), strict=True))
        self._known = [(numbers, numbers._version, found), *self._known[:3]]
        return found


def add_tiles(base: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, parts: Sequence[Tiles]) -> torch.Tensor:
    """Compute base(x), to which each tile D of rows r and columns c adds y[..., r] += x[..., c] @ D^T.

    For the backward pass only the columns of `x` that trained tiles take are kept.

    Args:
        base: The base layer, linear in `x`. What it returns may be written into.
        x: Activations `[..., in]`.
        parts: Tiles of the weight, `[out, in]`; those of the first part are trained.

    Returns:
        Activations `[..., out]`, in the dtype that the base layer returns.
    """
    x, link = tapped(x)
    output: torch.Tensor = _AddTiles.apply(base(x), x.detach(), parts[0][0], parts, link)  # type: ignore[no-untyped-call]
    return output


def _products(parts: Sequence[Tiles], dtype: torch.dtype) -> list[tuple[torch.Tensor, slice, slice]]:
    """Return each tile, and its rows and columns."""
    height, width = parts[0][0].shape[1:]
    return [
        (tile, slice(row, row + height), slice(column, column + width))
        for values, corners in parts
        for tile, (row, column) in zip(values.to(dtype).unbind(), corners, strict=True)
    ]


class _AddTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, parts: Sequence[Tiles], link: Link | None
    ) -> torch.Tensor:
        flat, output = x.reshape(-1, x.shape[-1]), writable(y)
        outputs = output.view(-1, y.shape[-1])
        for tile, rows, columns in _products(parts, y.dtype):
            outputs[:, rows].addmm_(flat[:, columns].to(y.dtype), tile.t())
        width, starts = values.shape[2], sorted({column for _, column in parts[0][1]})
        kept = [flat[:, start : start + width] for start in starts]
        ctx.save_for_backward(torch.cat(kept, 1).to(y.dtype) if kept else flat[:, :0], values)
        ctx.places = {start: place * width for place, start in enumerate(starts)}
        ctx.corners, ctx.kept, ctx.link = parts[0][1], parts[1:], link
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        taken, values = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        parts = [(values, ctx.corners), *ctx.kept]
        if ctx.link is not None:
            ctx.link.add_ = lambda out: _add_inputs_(out, rows, parts)
        own = None
        if ctx.needs_input_grad[2]:
            height, width = values.shape[1:]
            own = torch.empty_like(values, memory_format=torch.contiguous_format)
            for made, (row, column) in zip(own.unbind(), ctx.corners, strict=True):
                start = ctx.places[column]
                made.copy_(rows[:, row : row + height].t() @ taken[:, start : start + width])
        return gradient, None, own, None, None


def _add_inputs_(out: torch.Tensor, gradient: torch.Tensor, parts: Sequence[Tiles]) -> None:
    """Add to the gradient of the input what the tiles add to it."""
    for tile, rows, columns in _products(parts, out.dtype):
        out[:, columns].addmm_(gradient[:, rows].to(out.dtype), tile)
