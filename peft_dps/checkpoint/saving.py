"""Training states on the disk: one file, or one for each process where FSDP2 has cut the weights."""

from __future__ import annotations

import os
import secrets
import zlib
from pathlib import Path

import torch

from peft_dps.checkpoint.file import check_path, write
from peft_dps.checkpoint.parts import drop_part, find_save, write_index, write_part
from peft_dps.checkpoint.resharding import fits, reshard
from peft_dps.checkpoint.state import LOADING, damage_told, load_state, state_of
from peft_dps.errors import StateError
from peft_dps.tensors.processes import Ranks, together, world_of
from peft_dps.training.controller import Controller

_SAVING = "Saving the training state"


def save(controller: Controller, path: str | os.PathLike[str]) -> str:
    """Save the training state of an adapter. Where FSDP2 has cut the weights, all processes have to call it.

    Each process then writes a file of its own beside `path`, under a name that no other save has. The file at `path`
    follows when all of these are on the disk, and says which belong together. So a save that is cut off anywhere
    leaves the one before as it was.
    """
    world = processes_of(controller)
    if not world:
        return write(path, state_of(controller))
    ranks = world[0]
    _check_path(ranks, Path(path))
    name = f"{common_number(ranks):016x}"
    digest = ""
    try:
        with together(world, _SAVING, StateError):
            check_path(Path(path))
            state = state_of(controller)
            write_part(path, state, name, ranks.rank, ranks.size)
        with together(world, _SAVING, StateError):
            if ranks.rank == 0:
                digest = write_index(path, state["header"], name, ranks.size)
    except BaseException:
        drop_part(path, name, ranks.rank, ranks.size)
        raise
    return digest


def load(controller: Controller, path: str | os.PathLike[str]) -> None:
    """Go on where the training was whose state is at `path`; see `state.load_state`.

    It may have been cut over another number of processes, or over none: each reads the rows that it needs. Where FSDP2
    has cut the weights now, all processes have to call it.
    """
    world = processes_of(controller)
    with together(world, LOADING, StateError), damage_told(f"adapter {controller.adapter!r}"):
        saved = find_save(path)
        state = None
        if len(saved.paths) == (world[0].size if world else 1):
            own = saved.part(world[0].rank if world else 0)
            state = own.read() if fits(controller, own.header) else None
    cut_otherwise = [ranks.any(state is None) for ranks in world]
    if state is None or any(cut_otherwise):
        with together(world, LOADING, StateError), damage_told(f"adapter {controller.adapter!r}"):
            sources = [saved.part(rank) for rank in range(len(saved.paths))]
        state = reshard(controller, sources, world)
    load_state(controller, state)


def processes_of(controller: Controller) -> list[Ranks]:
    """Return all processes as one set if weights of an adapter are cut over them, else nothing."""
    return world_of(weight.ranks for weight in controller.existing)


def common_number(ranks: Ranks) -> int:
    """Agree on a random number below 2**63."""
    return int(ranks.gather(torch.tensor([secrets.randbits(63)], device="cpu"))[0])


def _check_path(ranks: Ranks, path: Path) -> None:
    found = ranks.gather(torch.tensor([zlib.crc32(str(path).encode())], device="cpu"))
    if not bool((found == found[0]).all()):
        raise StateError(
            f"The processes were told to save the training state under different names, this one as '{path}'. Give "
            "all the same one: each adds what tells its own file."
        )
