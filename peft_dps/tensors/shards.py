"""Weights that are cut over processes: which rows a process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from peft_dps.errors import EngineError
from peft_dps.tensors.processes import Ranks


@dataclass(frozen=True)
class Sharding:
    """How a weight is cut by rows, as `torch.chunk` cuts: the last processes may have fewer rows than others, or none.

    Attributes:
        ranks: The processes that hold the parts.
        shape: Shape of the whole weight.
    """

    ranks: Ranks
    shape: torch.Size

    @property
    def chunk(self) -> int:
        """Rows of the first process, which no other exceeds."""
        return -(-self.shape[0] // self.ranks.size)

    @property
    def first(self) -> int:
        """The first row that this process holds."""
        return min(self.ranks.rank * self.chunk, self.shape[0])

    @property
    def rows(self) -> int:
        """How many rows this process holds."""
        return min(self.chunk, self.shape[0] - self.first)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this process's rows of a tensor with as many rows as the whole weight, as a view."""
        return whole.narrow(0, self.first, self.rows)

    def whole_of(self, part: torch.Tensor) -> torch.Tensor:
        """Collect the rows of all processes, which all have to call it."""
        if part.shape[0] < self.chunk:
            padded = part.new_zeros((self.chunk, *part.shape[1:]))
            padded[: part.shape[0]] = part
            part = padded
        return self.ranks.gather(part).flatten(0, 1)[: self.shape[0]]


def sharding_of(parameter: torch.Tensor, name: str) -> Sharding | None:
    """Tell how a parameter is cut over processes."""
    if not isinstance(parameter, DTensor):
        return None
    placements, mesh = parameter.placements, parameter.device_mesh
    axes = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(axes) != 1 or type(placements[axes[0]]) is not Shard or not placements[axes[0]].is_shard(0):
        raise EngineError(
            f"The weight of {name!r} is placed as {tuple(placements)}, which is tensor parallelism, or FSDP2 along "
            "another axis than the first. DPS can train what `fully_shard` cuts by rows (Shard(0), alone or with one "
            "axis of replicas); leave out tensor parallelism and `shard_placement_fn`."
        )
    if mesh.ndim > 2:
        raise EngineError(
            f"The weight of {name!r} is spread over a mesh of {mesh.ndim} axes. DPS can train on one axis of shards, "
            "alone or with one axis of replicas."
        )
    sharding = Sharding(ranks_of(mesh, axes[0]), parameter.shape)
    if parameter.to_local().shape[0] != sharding.rows:
        raise EngineError(
            f"This process holds {parameter.to_local().shape[0]} rows of the weight of {name!r}, where "
            f"{sharding.rows} were expected. Shard the model with `fully_shard`."
        )
    return sharding


def ranks_of(mesh: DeviceMesh, axis: int) -> Ranks:
    """Return the processes along one axis of a mesh."""
    index = torch.accelerator.current_device_index() if mesh.device_type != "cpu" else None
    device = torch.device(mesh.device_type) if index is None else torch.device(mesh.device_type, index)
    return Ranks(mesh.get_group(axis), device)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or this process's rows of it where it is cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()
