"""Runs on every rank: trains compact adapters beside layers that tensor parallelism has split, and alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from compact_worker import EVERY, ONCE, ROWS, TILES, caught, compare, step
from fsdp_worker import batches, loss_of, mesh_of, my_share, optimizer_of, tracked
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from peft_dps import DPSConfig, dps_adapter, export_adapter
from peft_dps.errors import TargetError

BEFORE = {**ONCE, "score_steps": 0, "scope": "model"}
MAGNITUDE = {**ONCE, "score": "magnitude", "score_steps": 0}
PAIRS = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}


class Net(nn.Sequential):
    """Pairs of layers of which the first is split by outputs and the second by inputs; the last is whole."""

    def __init__(self) -> None:
        tanh, linear = nn.Tanh, nn.Linear
        first, second = (linear(12, 6), tanh(), linear(6, 8), tanh()), (linear(8, 10), tanh(), linear(10, 9))
        super().__init__(*first, *second, linear(9, 2))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def with_adapter(net: nn.Module, fields: dict[str, Any]) -> nn.Module:
    return get_peft_model(net, DPSConfig(target_modules=["0", "2", "4", "6", "7"], density=0.4, **fields))


def split(net: nn.Module, mesh: Any, inside: str = "", plan: dict[str, Any] = PAIRS) -> nn.Module:
    parallelize_module(net, mesh, {f"{place}{inside}": each for place, each in plan.items()})
    if inside:  # torch below 2.11 has forgotten that it was frozen
        for place in plan:
            net.get_submodule(f"{place}{inside}").requires_grad_(False)
    return net


def make_split(fields: dict[str, Any], mesh: Any, *, adapter_first: bool) -> nn.Module:
    if not adapter_first:
        return with_adapter(split(make_net(), mesh), fields)
    model = with_adapter(make_net(), fields)
    split(model.base_model.model, mesh, ".base_layer")
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return loss_of(model, *batch)


def compare_sums(model: nn.Module, alone: nn.Module, copies: int) -> None:
    """What one process has gathered, in each of them, has been added up over all."""
    for ours, theirs in zip(tracked(model), tracked(alone), strict=True):
        assert (ours.sums.total is None) == (theirs.sums.total is None)
        if theirs.sums.total is not None:
            torch.testing.assert_close(ours.sums.total * copies, theirs.sums.total, rtol=1e-10, atol=0)


def equals_one_process() -> None:
    mesh = mesh_of(dist.get_world_size())
    for fields, make, adapter_first in (
        (ONCE, sgd, True),
        (EVERY, optimizer_of, False),
        ({**EVERY, **ROWS}, optimizer_of, True),
        ({**BEFORE, **ROWS}, sgd, False),
        (MAGNITUDE, sgd, True),
    ):
        model, alone = make_split(fields, mesh, adapter_first=adapter_first), with_adapter(make_net(), fields)
        if not fields["score_steps"] and fields is not MAGNITUDE:
            model.dps_score(batches(2), loss=loss)
            alone.dps_score(batches(2), loss=loss)
        optimizer, optimizer_alone = make(model), make(alone)
        for batch in batches(5):
            step(model, optimizer, [batch])
            step(alone, optimizer_alone, [batch])
            compare(model, optimizer, alone, optimizer_alone)
            compare_sums(model, alone, 2)
        assert model.dps_status().engaged
        dps_adapter(model).check_ranks_agree()


def replicas_equal_one_process_too() -> None:
    """With an engine over the other axis of a mesh: each pair of processes has its share of a batch."""
    mesh = mesh_of(2, 2, names=("replicas", "split"))
    own = mesh.get_local_rank("replicas")
    for fields, wrap in ((BEFORE, in_ddp), ({**ONCE, **ROWS}, in_fsdp2)):
        model, alone = make_split(fields, mesh["split"], adapter_first=True), with_adapter(make_net(), fields)
        shares = [[my_share(batch, each, 2) for each in range(2)] for batch in batches(6)]
        if not fields["score_steps"]:
            model.dps_score([share[own] for share in shares], loss=loss)
            alone.dps_score([part for share in shares for part in share], loss=loss)
        engine = wrap(model, mesh["replicas"])
        optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
        for share in shares:
            step(engine, optimizer, [share[own]])
            step(alone, optimizer_alone, share)
            compare(model, optimizer, alone, optimizer_alone)
            if fields["score_steps"]:
                compare_sums(model, alone, 1)  # four times the squares of gradients that are half as large
        assert model.dps_status().engaged


def in_ddp(model: nn.Module, mesh: Any) -> nn.Module:
    """Without a broadcast, in which torch cannot mix tensors and DTensors."""
    return DistributedDataParallel(model, process_group=mesh.get_group(), init_sync=False)


def in_fsdp2(model: nn.Module, mesh: Any) -> nn.Module:
    for place in ("0", "2", "4"):
        fully_shard(model.base_model.model.get_submodule(place), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def files_are_those_of_one_process(folder: Path) -> None:
    for kind, fields in enumerate((MAGNITUDE, {**MAGNITUDE, **ROWS})):
        model = make_split(fields, mesh_of(dist.get_world_size()), adapter_first=True)
        optimizer = optimizer_of(model)
        for batch in batches(2):
            step(model, optimizer, [batch])
        x = batches(1)[0][0]
        expected = model.eval()(x).detach()
        assert not torch.allclose(expected, make_net()(x), atol=1e-3)
        own = folder / f"{kind}-{dist.get_rank()}"
        model.save_pretrained(own / "dps")
        export_adapter(model, own / "lora", form="lora")
        for name in ("dps", "lora"):
            loaded = PeftModel.from_pretrained(make_net(), own / name)
            torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-10)
        model = PeftModel.from_pretrained(split(make_net(), mesh_of(2)), own / "dps")
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


def a_plan_of_transformers(folder: Path) -> None:
    """With fewer inner features than twice the half, gathered logits, and norms of heads."""
    from transformers.distributed import DistributedConfig

    torch.manual_seed(0)
    is_old = Version(transformers.__version__) < Version("5.23")  # 5.17 cannot split unevenly, nor splits embeddings
    config = Qwen3Config(
        vocab_size=33 + is_old, hidden_size=16, intermediate_size=21 + is_old, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
        tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    if dist.get_rank() == 0:
        Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    dist.barrier()
    load = partial(AutoModelForCausalLM.from_pretrained, folder / "base", dtype=torch.float64)
    ids = torch.randint(0, 33, (4, 3, 9), generator=torch.Generator().manual_seed(1))
    for number, granularity in enumerate(("column", "row")):
        # `colwise_gather_output` of the head too
        fields = {**ONCE, "granularity": granularity, "score_steps": 2, "target_modules": r".*(_proj|lm_head)"}
        base = load(distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
        model, alone = (get_peft_model(each, DPSConfig(density=0.3, **fields)) for each in (base, load()))
        optimizer, optimizer_alone = optimizer_of(model), optimizer_of(alone)
        for batch in ids:
            for each, own_optimizer in ((model, optimizer), (alone, optimizer_alone)):
                each.train()
                each(input_ids=batch, labels=batch).loss.backward()
                own_optimizer.step()
                own_optimizer.zero_grad()
            compare(model, optimizer, alone, optimizer_alone)
        assert model.dps_status().engaged
        model.save_pretrained(folder / f"tp-{number}", is_main_process=dist.get_rank() == 0)
        dist.barrier()
        loaded = PeftModel.from_pretrained(load(), folder / f"tp-{number}").eval()
        with torch.no_grad():
            expected = model.eval()(input_ids=ids[0]).logits
            torch.testing.assert_close(loaded(input_ids=ids[0]).logits, expected, rtol=0, atol=1e-10)
            with model.disable_adapter():
                assert not torch.allclose(model(input_ids=ids[0]).logits, expected, atol=1e-3)
        with pytest.raises(TargetError, match="cannot be merged into a Linear: its weight is split over processes"):
            model.merge_and_unload()
        if is_old:
            continue
        with pytest.raises(TargetError, match="Embedding, is split over processes"):
            get_peft_model(model.unload(), DPSConfig(target_modules=["embed_tokens"], **ONCE))


def forward(model: nn.Module) -> Callable[[], Any]:
    return lambda: loss_of(model, *batches(1)[0]).backward()


def others_are_refused_by_name() -> None:
    mesh = mesh_of(2)
    for fields, what in (
        ({**ONCE, "granularity": "entry"}, "units that are no slices"),
        ({**ONCE, "granularity": "tensor"}, "units that are no slices"),
        ({**ONCE, **TILES}, "units that are no slices"),
        ({"stage_steps": 3}, "a copy of the whole weight"),
        ({**ONCE, "train_bias": True}, "a bias to train"),
    ):
        text = caught(forward(make_split(fields, mesh, adapter_first=True)))
        assert "tensor parallelism" in text, what in text
        assert what in text
        assert "granularity='column'" in text
    for fields in ({"stage_steps": 3}, {**ONCE, "train_bias": True}):
        with pytest.raises(TargetError, match="split over processes"):
            make_split(fields, mesh, adapter_first=False)
    for plan in (
        {"0": ColwiseParallel(input_layouts=Shard(0))},
        {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()},
        {"0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Shard(0))},
    ):
        for selected in (False, True):
            model = with_adapter(make_net(), {**BEFORE, "scope": "tensor"} if selected else ONCE)
            if selected:
                model.dps_score(batches(1), loss=loss)
            split(model.base_model.model, mesh, ".base_layer", plan)
            assert "sequence parallelism" in caught(forward(model)), (plan, selected)
    model = with_adapter(make_net(), ONCE)
    split(model.base_model.model, mesh, ".base_layer", {"0": ColwiseParallel(output_layouts=Replicate())})
    forward(model)()  # gathers all outputs
    model.base_model.model.get_submodule("0.base_layer").weight.requires_grad_(True)
    assert "forgets that it was frozen. Put the adapter on after the split" in caught(forward(model))
    forward(model.eval())()
    with pytest.raises(TargetError, match="its weight is cut over processes"):
        model.merge_adapter()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    equals_one_process()
    files_are_those_of_one_process(Path(sys.argv[1]))
    if Version(transformers.__version__) >= Version("5.17"):  # whose weights are DTensors
        a_plan_of_transformers(Path(sys.argv[1]))
    others_are_refused_by_name()
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)
