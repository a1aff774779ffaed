"""Processes that train together, what they tell each other, and how a failure of one becomes one of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from peft_dps.errors import DPSError


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
        total = counts.to(self.device, copy=True, memory_format=torch.contiguous_format)
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
        # torch 2.13 has a new name for it, and warns of the old one.
        collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        collect(gathered.view(-1), sent.view(-1), group=self.group)
        return gathered.to(part.device)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any of the processes: a sum of one int32."""
        return bool(self.sum(torch.tensor([flag], dtype=torch.int32, device=self.device)).item())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and self.members == other.members

    def __hash__(self) -> int:
        return hash(self.members)


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
