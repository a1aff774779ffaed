"""Runs on every rank: trains under FSDP2 and saves in the middle, or resumes from there in whatever number."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from fsdp_worker import (
    batches,
    everything,
    loss_of,
    make_model,
    mesh_of,
    my_share,
    optimizer_of,
    shard,
    tracked,
    train_sharded,
)
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from benchmarks.traffic import Collectives
from peft_dps import dps_adapter, register_for_checkpointing
from peft_dps.checkpoint import file as statefile
from peft_dps.checkpoint.parts import find_save
from peft_dps.errors import StateError
from tests.resuming import assert_same

STEPS = 8
STATE = "dps.safetensors"


class Training:
    """A model cut over the processes, with its optimizer."""

    def __init__(self, plan: dict[str, Any]) -> None:
        shape, size = plan.get("mesh", []), dist.get_world_size()
        mesh = mesh_of(*shape, names=("replicate", "shard")) if math.prod(shape) == size else mesh_of(size)
        self.model = shard(make_model(plan["fields"]), mesh=mesh)
        self.optimizer = optimizer_of(self.model)
        self.step = 0

    def run(self, until: int) -> None:
        train_sharded(self.model, self.optimizer, batches(STEPS)[self.step : until], micro=1, clip=None)
        self.step = until

    def states(self) -> dict[str, Any]:
        model, optimizer = get_model_state_dict(self.model), get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        dcp.save(self.states(), checkpoint_id=folder / "torch")
        dps_adapter(self.model).save_state(folder / STATE)

    def load(self, folder: Path, step: int) -> None:
        states = self.states()
        dcp.load(states, checkpoint_id=folder / "torch")
        set_model_state_dict(self.model, states["model"])
        set_optimizer_state_dict(self.model, self.optimizer, states["optimizer"])
        dps_adapter(self.model).load_state(folder / STATE)
        assert self.model.dps_status().steps == step
        self.step = step

    def trace(self) -> dict[str, torch.Tensor]:
        """Everything now and after each step to the end."""
        taken = {}
        while True:
            taken.update({f"{self.step}/{name}": tensor for name, tensor in everything(self.model).items()})
            if self.step == STEPS:
                return taken
            self.run(self.step + 1)


def on_first(work, *arguments: Any) -> None:
    if dist.get_rank() == 0:
        work(*arguments)
    dist.barrier()


def plans(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(path.parent, json.loads(path.read_text())) for path in sorted(folder.glob("*/plan.json"))]


def train(folder: Path) -> None:
    """Save in the middle, once more at another step so that there is something to be replaced, and go on."""
    for place, plan in plans(folder):
        training = Training(plan)
        training.run(plan["stop"] - 1)
        dps_adapter(training.model).save_state(place / STATE)
        training.run(plan["stop"])
        training.save(place)
        on_first(save_file, training.trace(), place / "train.safetensors")
        size = dist.get_world_size()
        assert len(list(place.glob(f"dps.*-of-{size:05d}.safetensors"))) == size  # the first save's are gone


def resume(folder: Path) -> None:
    for place, plan in plans(folder):
        training = Training(plan)
        training.load(place, plan["stop"])
        on_first(save_file, training.trace(), place / "resume.safetensors")


def load_in_another_number(folder: Path) -> None:
    """What was saved by another number of processes is the same here, goes on, and can be saved again."""
    for place, plan in plans(folder):
        training = Training(plan)
        training.load(place, plan["stop"])
        saved = load_file(place / "train.safetensors")
        prefix = f"{plan['stop']}/"
        expected = {name.removeprefix(prefix): each for name, each in saved.items() if name.startswith(prefix)}
        now = everything(training.model)
        if plan["fields"].get("frozen") != "gradient":
            assert not training.model.dps_status().frozen_moved
        on_first(assert_same, now, expected)
        training.run(STEPS)
        assert training.model.dps_status().engaged


def load_what_one_process_saved(folder: Path) -> None:
    for place, plan in plans(folder):
        training = Training(plan)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(training.model, load_file(place / "weights.safetensors"), options=options)
        dps_adapter(training.model).load_state(place / STATE)
        now = everything(training.model)
        on_first(assert_same, now, load_file(place / "alone.safetensors"))


def refused(work, match: str) -> None:
    """It is an error on every rank."""
    with pytest.raises(StateError, match=match):
        work()
    dist.barrier()


def a_save_and_a_load_communicate_little(folder: Path) -> None:
    place, plan = plans(folder)[0]
    training = Training(plan)
    training.load(place, plan["stop"])
    with Collectives() as collectives:
        dps_adapter(training.model).load_state(place / STATE)
    assert len(collectives.sent) == 4, collectives.sent
    with Collectives() as collectives:
        dps_adapter(training.model).save_state(place / "counted.safetensors")
    assert len(collectives.sent) == 4, collectives.sent


def what_does_not_belong_together_is_refused_on_all(folder: Path) -> None:
    rank, elsewhere = dist.get_rank(), "on another process"
    place, plan = plans(folder)[0]
    training = Training(plan)
    training.load(place, plan["stop"])
    before = everything(training.model)

    def load() -> None:
        dps_adapter(training.model).load_state(place / STATE)

    own = find_save(place / STATE).paths[rank]
    other = find_save(place / STATE).paths[1]
    whole = other.read_bytes()
    dist.barrier()  # before the first process damages it
    on_first(other.write_bytes, whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    refused(load, "is damaged" if rank == 1 else elsewhere)
    on_first(other.write_bytes, whole[:-100])
    refused(load, "cut off or damaged" if rank == 1 else elsewhere)
    on_first(other.unlink)
    refused(load, "no training state at" if rank == 1 else elsewhere)
    on_first(other.write_bytes, whole)

    dps_adapter(training.model).save_state(place / "again.safetensors")
    again = find_save(place / "again.safetensors").paths[1]
    on_first(other.write_bytes, again.read_bytes())  # the same step, but another save
    refused(load, "is of another save" if rank == 1 else elsewhere)
    on_first(other.write_bytes, whole)

    mine = statefile.StateFile(own).read()
    if rank == 1:
        mine["header"]["clock"]["scored_steps"] -= 1  # as good by itself
    refused(lambda: dps_adapter(training.model).load_state_dict(mine), "from different saves")
    if rank == 1:
        mine = {"header": {}}
    refused(lambda: dps_adapter(training.model).load_state_dict(mine), "or is none" if rank == 1 else elsewhere)
    path = place / f"state.{rank}.safetensors"
    refused(lambda: dps_adapter(training.model).save_state(path), "under different names")
    with torch.no_grad():  # of the last weight, whose rows all ranks but the first may lack
        tracked(training.model)[0].weight[:1] += rank
    refused(load, "values of the weight of '0'" if rank == 1 else elsewhere)
    with torch.no_grad():
        tracked(training.model)[0].weight[:1] -= rank
    training.load(place, plan["stop"])
    now = everything(training.model)
    on_first(assert_same, now, before)


def a_save_that_fails_on_one_leaves_the_earlier_one(folder: Path) -> None:
    rank = dist.get_rank()
    place, plan = plans(folder)[0]
    training = Training(plan)
    training.load(place, plan["stop"])
    before = everything(training.model)
    (place / "folder").mkdir(exist_ok=True)
    dist.barrier()
    files = sorted(entry.name for entry in place.iterdir())
    refused(lambda: dps_adapter(training.model).save_state(place / "folder"), "is a folder")
    assert sorted(entry.name for entry in place.iterdir()) == files
    dist.barrier()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for failing, name in ((1, "save_file"), (0, "save_file"), (1, "_flush")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(statefile, name, full_disk)
            with pytest.raises(OSError if rank == failing else StateError):
                dps_adapter(training.model).save_state(place / STATE)
        dist.barrier()
        assert sorted(entry.name for entry in place.iterdir()) == files
        training.load(place, plan["stop"])
    now = everything(training.model)
    on_first(assert_same, now, before)


def die_in_a_save(folder: Path) -> None:
    """The second rank is killed when its file of the second save is half written."""
    place, plan = plans(folder)[0]
    training = Training(plan)
    training.load(place, plan["stop"])
    training.run(STEPS)
    if dist.get_rank() == 1:

        def half(tensors: Any, path: Path, metadata: Any, save=statefile.save_file) -> None:
            save(tensors, path, metadata)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        statefile.save_file = half
    dps_adapter(training.model).save_state(place / STATE)


class Loop(Training):
    """The same by Accelerate, which has no FSDP2 on CPUs: it is told that this is FSDP."""

    def __init__(self, plan: dict[str, Any]) -> None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear", "Conv1DLinear"],
            cpu_ram_efficient_loading=False,
            state_dict_type=plan["state_dict_type"],
        )
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        # Each of Accelerate's objects takes it from there anew.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.torch_tp_plugin = None
        model = make_model(plan["fields"])
        if plan["fields"].get("offload_base"):
            plugin.ignored_modules = [weight.layer.base_layer for weight in tracked(model)]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model))
        register_for_checkpointing(self.accelerator, self.model)
        self.step = 0

    def run(self, until: int) -> None:
        for batch in batches(STEPS)[self.step : until]:
            self.accelerator.backward(loss_of(self.model, *my_share(batch, dist.get_rank(), dist.get_world_size())))
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step = until


def accelerate_saves(folder: Path) -> None:
    for place, plan in plans(folder):
        loop = Loop(plan)
        loop.run(plan["stop"])
        loop.accelerator.save_state(str(place / "checkpoint"))
        on_first(save_file, loop.trace(), place / "train.safetensors")


def accelerate_resumes(folder: Path) -> None:
    for place, plan in plans(folder):
        loop = Loop(plan)
        loop.accelerator.load_state(str(place / "checkpoint"))
        loop.step = plan["stop"]
        on_first(save_file, loop.trace(), place / "resume.safetensors")


def main(folder: Path, *modes: str) -> None:
    dist.init_process_group("gloo")
    for mode in modes:
        work, _, below = mode.partition("=")
        globals()[work](folder / below)
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
