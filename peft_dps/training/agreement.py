"""Do all processes agree? A check for debugging: nothing else needs what it communicates."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from peft_dps.errors import EngineError
from peft_dps.masking.frozen_bits import checksum
from peft_dps.tensors.processes import Ranks
from peft_dps.training.weight import TargetWeight

VARIABLE = "PEFT_DPS_CHECK_RANKS"


def is_wanted() -> bool:
    """Tell whether the environment asks for the check at every change of stage."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


@torch.no_grad()
def check_agreement(adapter: str, clock: Sequence[int], weights: Sequence[TargetWeight]) -> None:
    """Compare steps, masks and weights over all processes, which all have to call it. Alone it does nothing.

    Of sharded weights, processes that hold the same rows are compared (the replicas of HSDP).
    """
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if group is None or not weights:
        return
    ranks = weights[0].ranks
    world = Ranks(group, weights[0].weight.device if ranks is None else ranks.device)
    targets = zlib.crc32(repr([(weight.name, tuple(weight.parameter.shape)) for weight in weights]).encode())
    _compare(adapter, "targets", world, torch.tensor([targets], device="cpu"))
    _compare(adapter, "steps", world, torch.tensor(clock, device="cpu"))
    found = world.gather(torch.stack([_facts(weight) for weight in weights]))  # [process, weight, fact]
    for index, weight in enumerate(weights):
        for what, column in (("mask", 2), ("weight", 3)):
            for rows in found[:, index, :2].unique(dim=0):
                holders = (found[:, index, :2] == rows).all(1).nonzero().flatten()
                values = found[holders, index, column]
                if not bool((values == values[0]).all()):
                    _refuse(adapter, f"{what} of {weight.name!r}", holders, values)


def _facts(weight: TargetWeight) -> torch.Tensor:
    """Return the first row here, the number of rows, and checksums of the mask and of the bits of the weight."""
    own, sharding = weight.weight, weight.sharding
    mask = 0 if weight.choice is None else checksum(weight.choice)
    first = 0 if sharding is None else sharding.first
    return torch.tensor([first, own.shape[0], mask, checksum(own)], device="cpu")


def _compare(adapter: str, what: str, world: Ranks, values: torch.Tensor) -> None:
    found = world.gather(values)
    if not bool((found == found[0]).all()):
        _refuse(adapter, what, torch.arange(len(found), device=found.device), found.sum(1))


def _refuse(adapter: str, what: str, holders: torch.Tensor, values: torch.Tensor) -> None:
    other = int((values != values[0]).nonzero()[0])
    raise EngineError(
        f"Adapter {adapter!r}: processes {int(holders[0])} and {int(holders[other])} differ in the {what}. Their "
        "gradients are not the same (no gradient synchronization?), or something changed weights on one of them only."
    )
