"""Runs on every rank: trains compact adapters with an engine on the rank's share of each batch, and alone on all."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fsdp_worker import batches, loss_of, make_model, mesh_of, my_share, optimizer_of, shard, tracked
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peft_dps import dps_adapter
from peft_dps.errors import EngineError
from tests.compact import Tile

ONCE = {"storage": "compact", "schedule": "once", "score_steps": 3, "train_bias": False, "granularity": "column"}
EVERY = {**ONCE, "schedule": "every", "score_steps": 1, "stage_steps": 3}
ROWS = {"granularity": "row"}
TILES = {"granularity": Tile.__name__.lower()}
LARGEST = {"score": "magnitude", "score_steps": 0}  # by the pretrained weights, which FSDP2 cuts


def step(model: nn.Module, optimizer: torch.optim.Optimizer, shares: list[Any]) -> None:
    for share in shares:
        (loss_of(model, *share) / len(shares)).backward()
    optimizer.step()
    optimizer.zero_grad()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for batch in batches(count):
        step(model, optimizer, [my_share(batch, dist.get_rank(), dist.get_world_size())])


def step_both(engine: Any, optimizer: Any, alone: Any, optimizer_alone: Any, batch: Any) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    step(engine, optimizer, [my_share(batch, rank, size)])
    step(alone, optimizer_alone, [my_share(batch, each, size) for each in range(size)])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(engine: nn.Module, optimizer: Any, alone: nn.Module, optimizer_alone: Any) -> None:
    """Units, their values, and what the optimizers keep of them are those of one process."""
    for ours, theirs in zip(tracked(engine), tracked(alone), strict=True):
        assert ours.delta.is_selected == theirs.delta.is_selected
        assert torch.equal(ours.delta.index, theirs.delta.index), ours.name
        torch.testing.assert_close(ours.delta.values(), theirs.delta.values(), rtol=0, atol=1e-10)
        assert (ours.delta.kept is None) == (theirs.delta.kept is None)
        for own, other in zip(ours.delta.kept or (), theirs.delta.kept or (), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
        mine, expected = optimizer.state[ours.parameter], optimizer_alone.state[theirs.parameter]
        for key in expected:
            torch.testing.assert_close(whole(mine[key]), whole(expected[key]), rtol=0, atol=1e-10)
    assert engine.dps_status().steps == alone.dps_status().steps


def caught(work: Any) -> str:
    try:
        work()
    except EngineError as error:
        return str(error)
    raise AssertionError("no EngineError")


def ddp() -> None:
    grouped = {"target_modules": ["words", "conv", "head"]}  # whose columns are no slices
    for fields in (
        {**ONCE, "train_bias": True},
        {**ONCE, **ROWS},
        {**ONCE, "granularity": "entry"},
        EVERY,
        {**EVERY, **TILES},
        {**EVERY, **grouped},
        {**ONCE, **LARGEST},
    ):
        model, alone = make_model(fields), make_model(fields)
        wrapped = DistributedDataParallel(model)
        optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
        for batch in batches(8):
            step_both(wrapped, optimizer, alone, optimizer_alone, batch)
            compare(model, optimizer, alone, optimizer_alone)
        assert model.dps_status().engaged
        dps_adapter(model).check_ranks_agree()
    for fields in ({"scope": "model"}, {"granularity": "tensor"}, {"granularity": "block"}):
        units_of_another_number_are_selected_before_wrapping({**ONCE, **fields})
    a_bad_gradient_of_one_rank_is_not_scored_on_any()


def units_of_another_number_are_selected_before_wrapping(fields: dict[str, Any]) -> None:
    model = make_model(fields)
    wrapped, optimizer = DistributedDataParallel(model), optimizer_of(model)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert "Select before the model is wrapped" in caught(partial(steps, wrapped, optimizer, 4))
    model, alone = (make_model({**fields, "score_steps": 0}) for _ in range(2))
    shares = [(each, my_share(batch, each, size)) for batch in batches(2) for each in range(size)][:-1]  # uneven
    model.dps_score([share for each, share in shares if each == rank], loss=lambda net, batch: loss_of(net, *batch))
    alone.dps_score(
        [share for _, share in shares],
        loss=lambda net, batch: loss_of(net, *batch),
    )
    wrapped = DistributedDataParallel(model)
    optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
    for batch in batches(3):
        step_both(wrapped, optimizer, alone, optimizer_alone, batch)
    compare(model, optimizer, alone, optimizer_alone)
    assert model.dps_status().engaged


def a_bad_gradient_of_one_rank_is_not_scored_on_any() -> None:
    model = make_model(ONCE)
    wrapped, optimizer = DistributedDataParallel(model), optimizer_of(model)
    for number, batch in enumerate(batches(4)):
        x, y = my_share(batch, dist.get_rank(), dist.get_world_size())
        if number == 1 and dist.get_rank() == 1:
            x = x * float("inf")
        step(wrapped, optimizer, [(x, y)])
    assert model.dps_status().unscored_steps == 1
    dps_adapter(model).check_ranks_agree()


def fsdp2() -> None:
    mesh = mesh_of(dist.get_world_size())
    for fields, blocks in (
        (ONCE, None),
        ({**ONCE, **ROWS}, ()),
        ({**ONCE, "granularity": "entry"}, None),
        (EVERY, None),
        ({**EVERY, **ROWS}, None),
        ({**EVERY, **TILES}, None),
        ({**ONCE, **LARGEST, **TILES}, None),
        ({**ONCE, **LARGEST, "granularity": "entry"}, ()),
        (EVERY, ()),
        ({**EVERY, **ROWS}, ()),
    ):
        model, alone = make_model(fields), make_model(fields)
        shard(model, mesh=mesh) if blocks is None else shard(model, blocks, mesh=mesh)
        optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
        for batch in batches(8):
            step_both(model, optimizer, alone, optimizer_alone, batch)
            compare(model, optimizer, alone, optimizer_alone)
        assert model.dps_status().engaged
    a_weight_without_units_is_left_whole()


def a_weight_without_units_is_left_whole() -> None:
    """Where units of other weights of the model have the best scores."""
    models = []
    for _ in range(3):
        model = make_model({**ONCE, "scope": "model", "score_steps": 0, "density": 0.05})
        model.dps_score(batches(1), loss=lambda net, batch: loss_of(net, *batch))
        models.append(model)
    mesh = mesh_of(dist.get_world_size())
    model, alone, cut = models
    assert any(each.delta.slots == 0 for each in tracked(model))
    shard(model, mesh=mesh)
    optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
    for batch in batches(3):
        step_both(model, optimizer, alone, optimizer_alone, batch)
    compare(model, optimizer, alone, optimizer_alone)
    fully_shard(cut, mesh=mesh)
    assert "`ignored_params=" in caught(partial(steps, cut, optimizer_of(cut), 1))


def fsdp1() -> None:
    for original, by_module in ((True, False), (False, False), (True, True), (False, True)):
        for fields in (ONCE, {**ONCE, **ROWS}):
            model, alone = make_model(fields), make_model(fields)
            wrapped = flat(model, original, by_module)
            optimizer, optimizer_alone = sgd(wrapped), sgd(alone)
            for batch in batches(6):
                step_both(wrapped, optimizer, alone, optimizer_alone, batch)
            assert model.dps_status().engaged
            with FullyShardedDataParallel.summon_full_params(wrapped):
                for ours, theirs in zip(tracked(model), tracked(alone), strict=True):
                    assert torch.equal(ours.delta.index, theirs.delta.index)
                    torch.testing.assert_close(ours.delta.weight, theirs.delta.weight, rtol=0, atol=1e-10)
        wrapped = flat(make_model(EVERY), original, by_module)
        assert "schedule='once'" in caught(partial(steps, wrapped, sgd(wrapped), 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Adam would count the steps of zeros that a hidden optimizer makes while scoring."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


def flat(model: nn.Module, original: bool, by_module: bool) -> FullyShardedDataParallel:
    """Wrap a model as a whole, or as PEFT would have a Trainer do: each module that is trained by itself."""
    options: dict[str, Any] = {"use_orig_params": original, "device_id": torch.device("cpu")}
    if by_module:
        options["auto_wrap_policy"] = fsdp_auto_wrap_policy(model)
    elif not original:  # flat parameters are trained or frozen as a whole
        options["ignored_states"] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return FullyShardedDataParallel(model, **options)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"ddp": ddp, "fsdp2": fsdp2, "fsdp1": fsdp1}[sys.argv[1]]()
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)
