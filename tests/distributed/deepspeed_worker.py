"""Trains eight steps with DeepSpeed on one CPU process: deepspeed_worker.py <zero stage> <fp32 or bf16> <port>."""

from __future__ import annotations

import os
import sys

import deepspeed
import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSConfig
from peft_dps.errors import EngineError

STEPS = 8


def main(zero_stage: int, dtype: str) -> None:
    # It would be compiled for minutes, and one process shares no memory.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    model = get_peft_model(net, DPSConfig(target_modules=["0", "2"], stage_steps=2, density=0.5))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config={
            "train_batch_size": 8,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == "bf16"},
        },
    )
    x, y = torch.randn(8, 12), torch.randint(3, (8,))
    try:
        for _ in range(STEPS):
            output = engine(x.to(torch.bfloat16) if dtype == "bf16" else x)
            engine.backward(nn.functional.cross_entropy(output.float(), y))
            engine.step()
    except EngineError as error:
        sys.stdout.write(f"refused: {error}\n")
        return
    status = model.dps_status()
    sys.stdout.write(f"trained: {status.steps} steps, engaged {status.engaged}, frozen moved {status.frozen_moved}\n")


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = sys.argv[3]
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
