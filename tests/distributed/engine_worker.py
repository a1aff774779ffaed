"""Runs on every rank: what surrounds a training under FSDP2, and what DPS communicates in it."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fsdp_worker import (
    batches,
    compare,
    make_model,
    mesh_of,
    optimizer_of,
    shard,
    tracked,
    train_alone,
    train_sharded,
    whole_state,
)
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from benchmarks.traffic import Collectives
from peft_dps import dps_adapter
from peft_dps.errors import EngineError
from tests.unit.conftest import keep_of

MIX = {"variant": "mix"}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data) -> None:
    train_sharded(model, optimizer, data, micro=1, clip=None)


def state_dicts_make_no_steps_and_load(fields: dict, full: bool) -> None:
    """Optimizer state is made by phantom steps, which are no steps; what is loaded in SUBNETWORK is held."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model = shard(make_model(fields), mesh=mesh_of(dist.get_world_size()))
    optimizer = optimizer_of(model)
    get_optimizer_state_dict(model, optimizer, options=options)
    assert model.dps_status().steps == 0
    steps(model, optimizer, batches(4))
    saved = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
    saved = copy.deepcopy(saved)  # shards are handed out as they are
    assert model.dps_status().steps == 4
    before = whole_state(model)
    steps(model, optimizer, batches(1))
    if full and dist.get_rank() > 0:
        saved = {}, {}
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    set_model_state_dict(model, saved[0], options=options)
    set_optimizer_state_dict(model, optimizer, saved[1], options=options)
    assert model.dps_status().steps == 5
    for name, tensor in whole_state(model).items():
        assert dist.get_rank() > 0 or torch.equal(tensor, before[name]), name
    keeps = [keep_of(weight) for weight in tracked(model)]
    loaded = [weight.weight.clone() for weight in tracked(model)]
    steps(model, optimizer, batches(1))
    for weight, keep, tensor in zip(tracked(model), keeps, loaded, strict=True):
        assert torch.equal(weight.weight[keep == 0], tensor[keep == 0])


def the_adapter_is_saved_from_shards(folder: Path) -> None:
    model = shard(make_model({}), mesh=mesh_of(dist.get_world_size()))
    steps(model, optimizer_of(model), batches(3))
    state = whole_state(model)
    model.save_pretrained(folder, state_dict=state, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    torch.manual_seed(0)
    base = make_model({}).unload()
    loaded = PeftModel.from_pretrained(base, folder)
    if dist.get_rank() == 0:
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def mixed_precision_keeps_whole_precision_in_the_shards() -> None:
    for fields in ({}, MIX):
        model = make_model(fields).float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, mesh=mesh_of(dist.get_world_size()), mp_policy=policy)
        optimizer = optimizer_of(model)
        data = [(x.float(), y.float()) for x, y in batches(6)]
        steps(model, optimizer, data[:3])
        assert all(weight.gathered.total.dtype is torch.float32 for weight in tracked(model))
        before = [weight.weight.clone() for weight in tracked(model)]
        steps(model, optimizer, data[3:])
        assert model.dps_status().selected == sum(-(-weight.entries * 4 // 10) for weight in tracked(model))
        assert not model.dps_status().frozen_moved
        for weight, tensor in zip(tracked(model), before, strict=True):
            assert weight.weight.dtype is torch.float32
            moved = weight.weight != tensor
            assert not moved[keep_of(weight) == 0].any()
            assert moved[keep_of(weight) != 0].all()


def replicas_are_compared() -> None:
    size = dist.get_world_size()
    model = shard(make_model({}), mesh=mesh_of(size, 1, names=("replicate", "shard")))
    steps(model, optimizer_of(model), batches(4))
    dps_adapter(model).check_ranks_agree()
    if dist.get_rank() == 1:
        tracked(model)[1].frozen.mask.stored[0] ^= 1
    try:
        dps_adapter(model).check_ranks_agree()
    except EngineError as error:
        if "processes 0 and 1 differ in the mask of '2'" not in str(error):
            raise
    else:
        raise AssertionError("a difference went unnoticed")


def count(fields: dict) -> list[list[tuple[str, int]]]:
    """What is communicated in each of six steps, forward and backward included."""
    model = shard(make_model(fields), mesh=mesh_of(dist.get_world_size()))
    optimizer = optimizer_of(model)
    sent = []
    for batch in batches(6):
        with Collectives() as collectives:
            steps(model, optimizer, [batch])
        sent.append(sorted(collectives.sent))
    return sent


def dense_communicates_one_number_a_step_and_counts_at_the_switch() -> None:
    plain, dense = count({"score": "random", "stage_steps": 100}), count({})  # the first neither scores nor selects
    of_fsdp2 = {"_allgather_base_.default", "_reduce_scatter_base_.default"}
    assert {name for sent in plain for name, _ in sent} == of_fsdp2
    extra = []
    for with_dps, without in zip(dense, plain, strict=True):
        rest = list(with_dps)
        for each in without:
            rest.remove(each)
        extra.append(rest)
    agreement = [("allreduce_.default", 4)]
    histograms = [("allreduce_.default", 4 * 256 * 8)] * 8  # 4 weights; fp64 scores have 4 digits of 2 halves
    any_scores = [("allreduce_.default", 4 * 4)]  # whether all scores of a weight are 0
    assert extra[:3] == [agreement] * 3, extra
    assert sorted(extra[3]) == sorted(agreement * 2 + histograms + any_scores), extra[3]
    assert extra[4:] == [[], []], extra


def accelerate_loads_on_one_rank_and_saves_the_adapter(folder: Path) -> None:
    """Accelerate has no FSDP2 on CPUs: its own functions for it are called."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear", "Conv1DLinear"],
        cpu_ram_efficient_loading=True,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model, alone = make_model(MIX), make_model(MIX)
    if dist.get_rank() > 0:
        with torch.no_grad():  # these ranks have loaded nothing
            for parameter in model.parameters():
                parameter.zero_()
    accelerator.state.torch_tp_plugin = None
    model = fsdp2_prepare_model(accelerator, model)
    optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
    for batch in batches(5):
        steps(model, optimizer, [batch])
        train_alone(alone, optimizer_alone, [batch], clip=None)
        compare(model, alone)
    state = accelerator.get_state_dict(model)
    model.save_pretrained(folder, state_dict=state, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    if dist.get_rank() == 0:
        loaded = PeftModel.from_pretrained(make_model({}).unload(), folder)
        for weight, mine in zip(tracked(loaded), tracked(alone), strict=True):
            torch.testing.assert_close(weight.weight, mine.weight, rtol=0, atol=1e-12)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    os.environ["PEFT_DPS_CHECK_RANKS"] = "1"
    for fields in ({}, {"offload_base": True}):
        state_dicts_make_no_steps_and_load(fields, full=False)
        state_dicts_make_no_steps_and_load(fields, full=True)
    the_adapter_is_saved_from_shards(folder / "plain")
    mixed_precision_keeps_whole_precision_in_the_shards()
    replicas_are_compared()
    del os.environ["PEFT_DPS_CHECK_RANKS"]
    dense_communicates_one_number_a_step_and_counts_at_the_switch()
    accelerate_loads_on_one_rank_and_saves_the_adapter(folder / "accelerate")
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
