"""Shards a DPS model with FSDP2 and steps: DPS has to refuse by name."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_dps import DPSConfig, EngineError


def main() -> None:
    dist.init_process_group("gloo")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), DPSConfig(target_modules=["0"], stage_steps=1))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    model(torch.randn(2, 4)).sum().backward()
    try:
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    except EngineError as error:
        if "is sharded" not in str(error):
            raise
    else:
        raise AssertionError("a sharded weight was trained without DPS taking part")
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main()
