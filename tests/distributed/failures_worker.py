"""Runs on every rank: what goes wrong on one rank is noticed on all; what cannot be trained is refused by name."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from fsdp_worker import batches, loss_of, make_model, mesh_of, my_share, optimizer_of, shard, tracked, whole_keeps
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from peft_dps import register_score
from peft_dps.errors import EngineError, ScoreError


@register_score("nan_on_rank_1", evidence="none")
def nan_on_rank_1(context):
    return torch.full(context.weight.shape, float("nan") if dist.get_rank() == 1 else 1.0)


@register_score("raises_on_rank_1", evidence="none")
def raises_on_rank_1(context):
    if dist.get_rank() == 1:
        raise KeyError("no score")
    return torch.ones(context.weight.shape)


def backward(model: nn.Module, index: int = 0) -> None:
    x, y = my_share(batches(8)[index], dist.get_rank(), dist.get_world_size())
    loss_of(model, x, y).backward()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for index in range(count):
        backward(model, index)
        optimizer.step()
        optimizer.zero_grad()


def caught(kind: type[Exception], work) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def a_bad_gradient_in_one_shard_is_not_scored_on_any_rank() -> None:
    model = shard(make_model({}), mesh=mesh_of(2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    steps(model, optimizer, 1)
    before = [weight.gathered.total.clone() for weight in tracked(model)]
    backward(model, 1)
    if dist.get_rank() == 1:
        tracked(model)[0].gradient[0, 0] = float("inf")
    optimizer.step()
    optimizer.zero_grad()
    assert model.dps_status().unscored_steps == 1
    assert all(torch.equal(weight.gathered.total, total) for weight, total in zip(tracked(model), before, strict=True))
    with torch.no_grad():
        tracked(model)[0].weight.clamp_(-1, 1)  # or the loss is NaN from now on
    steps(model, optimizer, 2)
    assert model.dps_status().unscored_steps == 1
    assert all(keep is not None for keep in whole_keeps(model))


def a_bad_score_on_one_rank_is_an_error_on_all() -> None:
    for scope in ("tensor", "model"):
        for score, kind in (("nan_on_rank_1", ScoreError), ("raises_on_rank_1", KeyError)):
            model = shard(make_model({"score": score, "scope": scope, "stage_steps": 1}), mesh=mesh_of(2))
            optimizer = optimizer_of(model)
            expected = kind if dist.get_rank() == 1 else EngineError
            text = caught(expected, lambda model=model, optimizer=optimizer: steps(model, optimizer, 2))
            assert dist.get_rank() == 1 or "on another process" in text
            assert all(weight.frozen is None for weight in tracked(model))


def weights_cut_along_columns_are_refused() -> None:
    model = make_model({})
    fully_shard(
        model, mesh=mesh_of(2), shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % 2 == 0 else None
    )
    text = caught(EngineError, lambda: steps(model, optimizer_of(model), 1))
    assert "Shard(dim=1)" in text
    assert "tensor parallelism" in text


def tensor_parallel_weights_are_refused_in_the_forward() -> None:
    for placement in (Shard(0), Replicate()):
        model = make_model({})
        weights = model.base_model.model[0].dps_weight
        weights["default"] = nn.Parameter(distribute_tensor(weights["default"].data, mesh_of(2), [placement]))
        assert "tensor parallelism" in caught(EngineError, lambda model=model: backward(model))


def one_threshold_needs_one_set_of_processes() -> None:
    model = make_model({"scope": "model"})
    fully_shard(model.base_model.model[0], mesh=mesh_of(2))  # the rest is left whole
    text = caught(EngineError, lambda: steps(model, optimizer_of(model), 4))
    assert "scope='model'" in text, text


def mix_needs_the_base_beside_the_copy() -> None:
    model = make_model({"variant": "mix"})
    fully_shard(model.base_model.model[0].base_layer, mesh=mesh_of(2))
    shard(model, mesh=mesh_of(2))
    assert "sharded apart" in caught(EngineError, lambda: steps(model, optimizer_of(model), 1))


def offloaded_weights_are_not_to_be_cut() -> None:
    for variant in ("dense", "mix"):
        model = make_model({"variant": variant, "offload_base": True})
        fully_shard(model, mesh=mesh_of(2))
        assert "ignored_params" in caught(EngineError, lambda model=model: steps(model, optimizer_of(model), 1))


def fsdp1_is_refused() -> None:
    model = FullyShardedDataParallel(make_model({}), use_orig_params=True, device_id=torch.device("cpu"))
    text = caught(EngineError, lambda: steps(model, optimizer_of(model), 3))
    assert "FSDP1" in text, text


def main() -> None:
    dist.init_process_group("gloo")
    a_bad_gradient_in_one_shard_is_not_scored_on_any_rank()
    a_bad_score_on_one_rank_is_an_error_on_all()
    weights_cut_along_columns_are_refused()
    tensor_parallel_weights_are_refused_in_the_forward()
    one_threshold_needs_one_set_of_processes()
    mix_needs_the_base_beside_the_copy()
    offloaded_weights_are_not_to_be_cut()
    fsdp1_is_refused()
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main()
