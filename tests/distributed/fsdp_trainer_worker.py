"""Runs on every rank: a Trainer under FSDP2 saves checkpoints, or resumes from one in the middle."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

from tests.trainer_resuming import make_trainer

# What is trained, how its weights are saved, and where it stops; stages are 3 steps long.
PLANS = (
    ({"variant": "mix"}, "SHARDED_STATE_DICT", 2),
    ({}, "FULL_STATE_DICT", 5),
)


def make(folder: Path, fields: dict, state_dict_type: str) -> Trainer:
    """Transformers and Accelerate have no FSDP2 on CPUs: they are told that this is FSDP."""
    AcceleratorState._reset_state()
    trainer = make_trainer(folder, fields, max_steps=8, per_device_train_batch_size=2, ddp_backend="gloo")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type=state_dict_type,
    )
    state = trainer.accelerator.state
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin, state.torch_tp_plugin = plugin, None
    trainer.is_fsdp_enabled = True
    return trainer


def main(mode: str, folder: Path) -> None:
    for index, (fields, state_dict_type, stop) in enumerate(PLANS):
        place = folder / str(index)
        trainer = make(place, fields, state_dict_type)
        if mode == "train":
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=str(place / f"checkpoint-{stop}"))
        local = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for name, tensor in trainer.trace.items()
            if int(name.partition("/")[0]) > stop
        }
        save_file({name: tensor.contiguous() for name, tensor in local.items()}, place / f"{mode}{dist.get_rank()}")
        dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
