"""Trains compact adapters with DeepSpeed on a CPU: deepspeed_compact_worker.py <zero stage> <fp32 or bf16> <port>."""

from __future__ import annotations

import os
import sys

import deepspeed
import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSConfig
from peft_dps.errors import EngineError

COMPACT = {"storage": "compact", "granularity": "column", "train_bias": False, "density": 0.25}


def make_model(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    return get_peft_model(net, DPSConfig(target_modules=["0", "2"], **{**COMPACT, **fields}))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 12, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)
    ]


def train(model: nn.Module, stage: int, dtype: str, count: int) -> nn.Module:
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained(model),
        optimizer=torch.optim.SGD(trained(model), lr=1e-1),
        config={
            "train_batch_size": 8,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == "bf16"},
        },
    )
    for x, y in batches(count):
        output = engine(x.to(torch.bfloat16) if dtype == "bf16" else x)
        engine.backward(nn.functional.cross_entropy(output.float(), y))
        engine.step()
    return engine


def train_alone(model: nn.Module, count: int) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=1e-1)
    for x, y in batches(count):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def deltas(model: nn.Module) -> list[nn.Module]:
    return [model.base_model.model[place].dps_delta["default"] for place in (0, 2)]


def main(stage: int, dtype: str) -> None:
    # It would be compiled for minutes, and one process shares no memory.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    for granularity in ("column", "row"):
        fields = {"schedule": "once", "score_steps": 3, "granularity": granularity}
        model, alone = make_model(**fields), make_model(**fields)
        train(model, stage, dtype, 8)
        train_alone(alone, 8)
        assert model.dps_status().engaged
        for ours, theirs in zip(deltas(model), deltas(alone), strict=True):
            with deepspeed.zero.GatheredParameters([ours.weight], enabled=stage == 3):
                assert ours.weight.count_nonzero()
                if dtype == "fp32":
                    assert torch.equal(ours.index, theirs.index)
                    torch.testing.assert_close(ours.weight.detach(), theirs.weight.detach(), rtol=0, atol=1e-5)
    try:
        train(make_model(schedule="every", score_steps=1, stage_steps=3), stage, dtype, 8)
    except EngineError as error:
        sys.stdout.write(f"refused: {error}\n")
    sys.stdout.write("trained\n")


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = sys.argv[3]
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
