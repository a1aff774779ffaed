"""Runs on every rank: goes on from where another number of processes stopped: reshard_worker.py DIR FROM TO.

One process trains without FSDP2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from peft_dps import dps_adapter
from peft_dps.tensors.shards import local_part
from tests.distributed.fsdp_worker import (
    LAYERS,
    batches,
    everything,
    loss_of,
    make_model,
    mesh_of,
    my_share,
    optimizer_of,
    shard,
)

STATE = "state"  # without an ending: users may call the file what they like
_watched: list[str] = []


def watch(event: str, _: Any) -> None:
    if event.startswith("pickle.") and _watched:
        raise AssertionError(f"{event} while {_watched[-1]} is loaded")


@contextmanager
def nothing_is_unpickled(what: str) -> Iterator[None]:
    _watched.append(what)
    try:
        yield
    finally:
        _watched.pop()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, rank: int = 0, size: int = 1) -> None:
    """Make steps with gradients that are rounded, so that it does not show in which order processes add them up."""
    for batch in data:
        loss_of(model, *my_share(batch, rank, size)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                gradient = local_part(parameter.grad)
                gradient.copy_((gradient * 2**30).round() / 2**30)
        optimizer.step()
        optimizer.zero_grad()


def go_on(place: Path, start: int, stop: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    fields = json.loads((place / "plan.json").read_text())
    model = make_model(fields)
    if size > 1:
        model = shard(model, tuple(fields.get("target_modules", LAYERS)), mesh=mesh_of(size))
    optimizer = optimizer_of(model)
    if start:
        states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(states, checkpoint_id=place / f"{start}")
        set_model_state_dict(model, states["model"])
        set_optimizer_state_dict(model, optimizer, states["optimizer"])
        with nothing_is_unpickled("the training state"):
            dps_adapter(model).load_state(place / f"{start}" / STATE)
    train(model, optimizer, batches(stop)[start:], rank, size)
    (place / f"{stop}").mkdir(exist_ok=True)
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(states, checkpoint_id=place / f"{stop}")
    dps_adapter(model).save_state(place / f"{stop}" / STATE)
    reached = everything(model)
    if rank == 0:
        save_file(reached, place / f"{stop}.safetensors")


def main(folder: Path, start: int, stop: int) -> None:
    dist.init_process_group("gloo")
    sys.addaudithook(watch)
    for plan in sorted(folder.glob("*/plan.json")):
        go_on(plan.parent, start, stop)
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
