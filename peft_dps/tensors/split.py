"""Linear layers that tensor parallelism splits: what a process has of them, and what it tells the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from peft_dps.errors import EngineError
from peft_dps.tensors.processes import Ranks
from peft_dps.tensors.shards import Sharding, ranks_of


@dataclass(frozen=True)
class Split:
    """How the outputs or the inputs of a linear layer are split over processes that compute one forward together.

    What every process has is the same on all of them, and so is its gradient.

    Attributes:
        ranks: The processes; None where each has everything.
        axis: 0 if outputs are split, 1 if inputs are.
        shape: Number of outputs and of inputs of the whole layer.
        first: The first that this process has.
        count: How many it has.
    """

    ranks: Ranks | None
    axis: int
    shape: tuple[int, int]
    first: int
    count: int

    @property
    def part_shape(self) -> tuple[int, int]:
        """Number of outputs and of inputs that this process has."""
        return (self.count, self.shape[1]) if self.axis == 0 else (self.shape[0], self.count)

    @property
    def whole(self) -> Split:
        """The same layer where its hooks give every process all inputs and all outputs."""
        return replace(self, ranks=None, first=0, count=self.shape[self.axis])

    @property
    def here(self) -> slice:
        """The outputs or inputs of this process."""
        return slice(self.first, self.first + self.count)

    def held(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell which of some outputs or inputs this process has: where they stand in `index`, and where here."""
        at = ((index >= self.first) & (index < self.first + self.count)).nonzero().view(-1)
        return at, index[at] - self.first

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up over the processes; not differentiable."""
        return tensor if self.ranks is None else self.ranks.sum(tensor)

    def part(self, whole: torch.Tensor, axis: int, at: Any) -> torch.Tensor:
        """Take a part of what every process has. Backward, the gradients of all parts are put together."""
        part: torch.Tensor = _Part.apply(whole, axis, at, self)  # type: ignore[no-untyped-call]
        return part

    def join(self, part: torch.Tensor, axis: int, at: Any, length: int) -> torch.Tensor:
        """Put together what processes have parts of. Backward, each takes the gradient of its own."""
        whole: torch.Tensor = _Join.apply(part, axis, at, length, self)  # type: ignore[no-untyped-call]
        return whole


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, axis: int, at: Any, split: Split) -> torch.Tensor:
        ctx.place = axis, at, whole.shape[axis], split
        return _at(whole, axis, at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        axis, at, length, split = ctx.place
        return split.sum(embedded(gradient, axis, at, length)), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, axis: int, at: Any, length: int, split: Split) -> torch.Tensor:
        ctx.place = axis, at
        return split.sum(embedded(part, axis, at, length))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _at(gradient, *ctx.place), None, None, None, None


def _at(tensor: torch.Tensor, axis: int, at: Any) -> torch.Tensor:
    return tensor.movedim(axis, 0)[at].movedim(0, axis)


def embedded(part: torch.Tensor, axis: int, at: Any, length: int) -> torch.Tensor:
    """Return zeros that have a part in its place."""
    shape = list(part.shape)
    shape[axis] = length
    whole = part.new_zeros(shape)
    whole.movedim(axis, 0)[at] = part.movedim(axis, 0)
    return whole


EVERYTHING = slice(None)


def split_of(weight: DTensor) -> Split:
    """Tell how the weight `[out, in]` of a linear layer is split.

    Raises:
        EngineError: If it is placed in another way than by its outputs or its inputs over one axis of a mesh.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if len(placements) != 1 or type(placements[0]) is not Shard:
        raise EngineError(
            f"A linear layer has a weight placed as {tuple(placements)}. DPS can train beside weights that "
            "ColwiseParallel or RowwiseParallel has split over one axis of a mesh. Choose one of these plans, or "
            "leave the layer out with `exclude_modules`; with `fully_shard` besides, call the module that was sharded."
        )
    axis, ranks = placements[0].dim % weight.dim(), ranks_of(mesh, 0)
    along = Sharding(ranks, torch.Size([weight.shape[axis]]))  # cut in the way of rows
    return Split(ranks, axis, (weight.shape[0], weight.shape[1]), along.first, along.rows)
