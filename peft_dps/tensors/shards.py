"""Weights that are cut over processes: which rows a process holds, and what the processes tell each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from peft_dps.errors import DPSError, EngineError


class Ranks:
    """Processes that hold a part of each weight, in the order of the rows.

    Args:
        group: Their process group.
        device: Where that group communicates.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.members = tuple(dist.get_process_group_ranks(group))

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Add up the counts of all processes."""
        total = counts.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(counts.device)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Collect a tensor from each process.

        Args:
            part: A tensor of one shape and dtype on all processes.

        Returns:
            A tensor `[size, *shape]` on the device of `part`.
        """
        sent = part.to(self.device).contiguous()
        gathered = sent.new_empty((self.size, *sent.shape))
        dist.all_gather_single(gathered.view(-1), sent.view(-1), group=self.group)
        return gathered.to(part.device)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any of the processes: a sum of one int32."""
        return bool(self.sum(torch.tensor([flag], dtype=torch.int32, device=self.device)).item())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and self.members == other.members

    def __hash__(self) -> int:
        return hash(self.members)


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
    index = torch.accelerator.current_device_index() if mesh.device_type != "cpu" else None
    device = torch.device(mesh.device_type) if index is None else torch.device(mesh.device_type, index)
    sharding = Sharding(Ranks(mesh.get_group(axes[0]), device), parameter.shape)
    if parameter.to_local().shape[0] != sharding.rows:
        raise EngineError(
            f"This process holds {parameter.to_local().shape[0]} rows of the weight of {name!r}, where "
            f"{sharding.rows} were expected. Shard the model with `fully_shard`."
        )
    return sharding


def distinct(ranks: Iterable[Ranks | None]) -> list[Ranks]:
    """Return each set of processes once, in order."""
    return list(dict.fromkeys(each for each in ranks if each is not None))


def world_of(ranks: Iterable[Ranks | None]) -> list[Ranks]:
    """Return all processes of the training as one set if any weight is cut over some of them, else nothing."""
    cut = distinct(ranks)
    group = dist.group.WORLD
    return [Ranks(group, cut[0].device)] if cut and group is not None else []


def world(device: torch.device) -> Ranks | None:
    """Return all processes of the training, which communicate where `device` is; None if there is one only."""
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return None if group is None or dist.get_world_size(group) == 1 else Ranks(group, device)


@contextmanager
def together(everyone: list[Ranks], doing: str, error: type[DPSError]) -> Iterator[None]:
    """Make an exception on one process one on all, so that none waits for it in the next communication."""
    try:
        yield
    except Exception:
        for ranks in everyone:
            ranks.any(True)
        raise
    failed = [ranks.any(False) for ranks in everyone]
    if any(failed):
        raise error(f"{doing} failed on another process, whose error says why. This one is as before.")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or this process's rows of it where it is cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()
