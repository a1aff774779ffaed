"""Runs on every rank: trains under DDP on the rank's share of each batch, then compares weights and masks."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.traffic import Collectives
from peft_dps import DPSConfig, dps_adapter
from peft_dps.errors import EngineError

FIELDS: dict[str, dict[str, object]] = {
    "dense": {},
    "mix": {"variant": "mix"},
    "lt_sft": {"schedule": "two-phase", "score": "movement", "scope": "model"},
    "scored": {"schedule": "once", "score_steps": 0},
    "mixconnect": {"noise": "mixconnect", "schedule": "once", "score_steps": 3},
}


def make_model(method: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    config = DPSConfig(**{"target_modules": ["0", "2"], "density": 0.4, "stage_steps": 3, **FIELDS[method]})
    return get_peft_model(net, config)


def state_of(model: nn.Module) -> list[torch.Tensor]:
    layers = [model.base_model.model[index] for index in (0, 2)]
    weights = layers[0].dps_controllers["default"].weights
    return [*(weight.weight.detach() for weight in weights), *(weight.frozen.mask.keep.float() for weight in weights)]


def score_before_training(model: nn.Module, alone: nn.Module, rank: int, size: int) -> None:
    """The first process has a batch more than the others."""
    generator = torch.Generator().manual_seed(3)
    made = [
        (torch.randn(4, 12, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(size + 1)
    ]
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    model.dps_score(made[rank::size], loss)
    alone.dps_score(made, loss)


def a_difference_is_named(model: nn.Module, rank: int) -> None:
    weight = model.base_model.model[2].dps_controllers["default"].weights[1]
    if rank == 1:
        with torch.no_grad():
            weight.weight[0, 0] += 1
    try:
        dps_adapter(model).check_ranks_agree()
    except EngineError as error:
        if "processes 0 and 1 differ in the weight of '2'" not in str(error):
            raise
    else:
        raise AssertionError("a difference went unnoticed")


def main(method: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # ranks differ in everything random, but not in their masks
    model = make_model(method)
    torch.manual_seed(100 + rank)
    alone = make_model(method)
    if method == "scored":
        score_before_training(model, alone, rank, size)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer_alone = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        x, y = torch.randn(8, 12, generator=generator), torch.randint(3, (8,), generator=generator)
        mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
        for each, stepper, share in ((wrapped, optimizer, mine), (alone, optimizer_alone, slice(None))):
            stepper.zero_grad()
            nn.functional.cross_entropy(each(x[share]), y[share]).backward()
            with Collectives() as collectives:
                stepper.step()
            if collectives.sent:
                raise AssertionError(f"DPS communicated: {collectives.sent}")
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise AssertionError(f"buffers that DDP would broadcast: {buffers}")
    for tensor in state_of(model):
        gathered = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(gathered, tensor)
        if not all(torch.equal(gathered[0], other) for other in gathered):
            raise AssertionError("ranks differ")
    for ours, expected in zip(state_of(model), state_of(alone), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    dps_adapter(wrapped).check_ranks_agree()
    a_difference_is_named(model, rank)
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
