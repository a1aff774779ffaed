"""Runs on every rank: trains compact adapters beside layers that tensor parallelism has split, and alone."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from compact_worker import EVERY, ONCE, ROWS, caught, compare, step
from fsdp_worker import batches, loss_of, mesh_of, optimizer_of, tracked
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from peft_dps import DPSConfig, dps_adapter

BEFORE = {**ONCE, "score_steps": 0}


class Net(nn.Sequential):
    """Pairs of layers of which the first is split by outputs and the second by inputs; the last is whole."""

    def __init__(self) -> None:
        tanh = nn.Tanh
        super().__init__(
            nn.Linear(12, 6), tanh(), nn.Linear(6, 8), tanh(), nn.Linear(8, 10), tanh(), nn.Linear(10, 9), nn.Linear(9, 2)
        )


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def with_adapter(net: nn.Module, fields: dict[str, Any]) -> nn.Module:
    return get_peft_model(net, DPSConfig(target_modules=["0", "2", "4", "6", "7"], density=0.4, **fields))


def parallelize(net: nn.Module, place: str) -> None:
    plans = {"0": ColwiseParallel, "2": RowwiseParallel, "4": ColwiseParallel, "6": RowwiseParallel}
    parallelize_module(net, mesh_of(dist.get_world_size()), {f"{at}{place}": plan() for at, plan in plans.items()})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def both(fields: dict[str, Any], *, split_first: bool) -> tuple[nn.Module, nn.Module]:
    net = make_net()
    if split_first:
        parallelize(net, "")
        model = with_adapter(net, fields)
    else:
        model = with_adapter(net, fields)
        parallelize(net, ".base_layer")
    return model, with_adapter(make_net(), fields)


def equals_one_process() -> None:
    for number, fields in enumerate(
        (ONCE, {**ONCE, **ROWS}, EVERY, {**EVERY, **ROWS}, {**BEFORE, "scope": "model"}, {**BEFORE, **ROWS, "scope": "model"})
    ):
        model, alone = both(fields, split_first=bool(number % 2))
        if not fields["score_steps"]:
            for each in (model, alone):
                each.score(batches(2), loss=lambda net, batch: loss_of(net, *batch))
        for make in (sgd, optimizer_of):
            optimizer, optimizer_alone = make(model), make(alone)
            for batch in batches(7):
                step(model, optimizer, [batch])
                step(alone, optimizer_alone, [batch])
                compare(model, optimizer, alone, optimizer_alone)
        assert model.dps_status().engaged
        dps_adapter(model).check_ranks_agree()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"equals_one_process": equals_one_process}[sys.argv[1]]()
    dist.barrier()
    os._exit(0)
