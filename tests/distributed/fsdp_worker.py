"""Runs on every rank: trains under FSDP2 on the rank's share of each batch; rank 0 trains the same alone."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_dps import DPSConfig, unsharded_parameters
from peft_dps.tuner.adapter import find_controllers
from tests.resuming import as_bits, held_by
from tests.unit.conftest import keep_of

LAYERS = ("0", "2", "4", "6")


class Net(nn.Sequential):
    """The last weight has fewer rows than there are processes; the third is a Conv1D, cut along its input columns."""

    recompute = False

    def __init__(self) -> None:
        tanh = nn.Tanh
        super().__init__(
            nn.Linear(12, 7), tanh(), nn.Linear(7, 8, bias=False), tanh(), Conv1D(6, 8), tanh(), nn.Linear(6, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = checkpoint(module, x, use_reentrant=False) if self.recompute else module(x)
        return x


class OtherNet(nn.Module):
    """An embedding, and a convolution in groups, which the cuts between processes do not respect."""

    recompute = False

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.head = nn.Embedding(10, 4), nn.Conv1d(4, 6, 3, groups=2), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.words((x.abs() * 5).long().clamp(max=9))
        return self.head(torch.tanh(self.conv(words.transpose(1, 2)).mean(2)))


def make_model(fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    defaults = {"target_modules": list(LAYERS), "density": 0.4, "stage_steps": 3}
    net = OtherNet() if "words" in fields.get("target_modules", ()) else Net()
    return get_peft_model(net.double(), DPSConfig(**{**defaults, **fields}))


def shard(model: nn.Module, blocks: tuple[str, ...] = LAYERS, **options: Any) -> nn.Module:
    """Cut each block and then the rest, as one does with a transformer."""
    net, options = model.base_model.model, {**options, "ignored_params": unsharded_parameters(model)}
    for name in blocks:
        fully_shard(net.get_submodule(name), **options)
    return fully_shard(model, **options)


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x).to(y.dtype), y)


def batches(count: int, seed: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(24, 12, generator=generator).double(), torch.randn(24, 2, generator=generator).double())
        for _ in range(count)
    ]


def my_share(batch: tuple[torch.Tensor, torch.Tensor], rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = slice(rank * 24 // size, (rank + 1) * 24 // size)
    return batch[0][rows], batch[1][rows]


def train_sharded(model: nn.Module, optimizer: Any, data: Any, *, micro: int, clip: float | None) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for batch in data:
        x, y = my_share(batch, rank, size)
        parts = list(zip(x.chunk(micro), y.chunk(micro), strict=True))
        for index, part in enumerate(parts):
            model.set_requires_gradient_sync(index == len(parts) - 1)
            (loss_of(model, *part) / micro).backward()
        step(model, optimizer, clip)


def train_alone(model: nn.Module, optimizer: Any, data: Any, *, clip: float | None) -> None:
    for batch in data:
        loss_of(model, *batch).backward()
        step(model, optimizer, clip)


def step(model: nn.Module, optimizer: Any, clip: float | None) -> None:
    if clip is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad()


def tracked(model: nn.Module) -> list[Any]:
    return find_controllers(model)["default"].weights


def whole_keeps(model: nn.Module) -> list[torch.Tensor | None]:
    """The masks, collected from all ranks."""
    return [
        None if (keep := keep_of(weight)) is None else weight.sharding.whole_of(keep).clone()
        for weight in tracked(model)
    ]


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, and all that DPS holds, as bits and whole, whatever they are cut into."""
    held = dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    for weight in tracked(model):
        for kind, tensor in held_by(weight).items():
            if kind != "checksum":  # of the rows that are here
                cut = weight.sharding is not None and kind != "participation"
                held[f"{kind}/{weight.name}"] = weight.sharding.whole_of(tensor) if cut else tensor
    return {name: as_bits(tensor).contiguous().clone() for name, tensor in held.items()}


def compare(sharded: nn.Module, alone: nn.Module) -> None:
    """Weights and masks are those of one process. The weights are fp64: rounding does not reach the masks."""
    keeps, state = whole_keeps(sharded), whole_state(sharded)
    status = sharded.dps_status()
    if dist.get_rank() > 0:
        return
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(
            state[name], tensor, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    expected = alone.dps_status()
    assert (status.steps, status.stage, status.selected) == (expected.steps, expected.stage, expected.selected)
    assert {name: layer.selected for name, layer in status.layers.items()} == {
        name: layer.selected for name, layer in expected.layers.items()
    }
    for keep, weight in zip(keeps, tracked(alone), strict=True):
        expected_keep = keep_of(weight)
        assert (keep is None) == (expected_keep is None)
        if keep is not None:
            assert torch.equal(keep, expected_keep), weight.name


def run(settings: dict[str, Any]) -> None:
    """Train 8 steps both ways and compare after each."""
    sharding = dict(settings.get("sharding", {}))
    if "mesh" in sharding:
        sharding["mesh"] = mesh_of(*sharding["mesh"], names=tuple(sharding.pop("names")))
    else:
        sharding["mesh"] = mesh_of(dist.get_world_size())
    if sharding.pop("on_host", False):
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=False)  # which takes an accelerator
    model, alone = make_model(settings.get("fields", {})), make_model(settings.get("fields", {}))
    model.base_model.model.recompute = settings.get("recompute", False)
    blocks = tuple(settings.get("blocks", LAYERS))
    if settings.get("base_apart"):  # W0 is then never collected
        for weight in tracked(model):
            fully_shard(weight.layer.base_layer, **sharding)
    shard(model, blocks, **sharding)
    optimizer = optimizer_of(model, **settings.get("optimizer", {}))
    optimizer_alone = optimizer_of(alone, **settings.get("optimizer", {}))
    clip = settings.get("clip")
    for batch in batches(8):
        train_sharded(model, optimizer, [batch], micro=settings.get("micro", 1), clip=clip)
        train_alone(alone, optimizer_alone, [batch], clip=clip)
        moves = "gradient" in settings.get("fields", {}).get("frozen", "exact")
        assert moves or not model.dps_status().frozen_moved
        for weight in tracked(model):
            assert isinstance(weight.parameter, DTensor)
            assert isinstance(weight.layer.pretrained_parameter, DTensor) is not weight.layer.is_offloaded
        compare(model, alone)
    assert model.dps_status().engaged


def main(settings: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo")
    for each in settings:
        if "worker" in each:  # something else that takes as many processes, which cost most of the time
            getattr(import_module(each["worker"]), each["part"])()
        else:
            run(each)
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
