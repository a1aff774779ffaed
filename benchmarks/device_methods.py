"""The methods that `benchmarks.device` compares: ways to prepare one and the same decoder in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_dps import DPSConfig

Prepare = Callable[[PreTrainedModel, "Plan"], nn.Module]
FULL = "full"
_FOREVER = 10**6  # steps


@dataclass(frozen=True)
class Plan:
    """What methods have in common.

    Attributes:
        density: Fraction of entries that are trained, of DPS in SUBNETWORK and of SHiRA.
        stage_steps: Steps in a stage of DPS.
        rank: Rank of LoRA.
        units: Columns of each weight, where a number of them is given.
    """

    density: float = 0.05
    stage_steps: int = 6
    rank: int = 16
    units: int = 16


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: What flags and tables call it.
        trains: What it trains, and in which dtype.
        prepare: Makes a freshly built model ready for it.
        stages: Whether its steps differ by stage.
    """

    name: str
    trains: str
    prepare: Prepare
    stages: bool = False


class MasterLinear(nn.Linear):
    """A linear layer with weights in fp32 that computes in the dtype of its input, as a DPS layer does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def targets(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """Find what PEFT targets with "all-linear"."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            yield module


def _full(model: PreTrainedModel, _: Plan) -> nn.Module:
    return model


def _linear(dtype: torch.dtype) -> Prepare:
    def prepare(model: PreTrainedModel, _: Plan) -> nn.Module:
        model.requires_grad_(False)
        for module in list(targets(model)):
            module.to(dtype).requires_grad_(True)
            if dtype is torch.float32:
                module.__class__ = MasterLinear
        return model

    return prepare


def _lora(model: PreTrainedModel, plan: Plan) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=plan.rank, target_modules="all-linear"))


def _lora_fa(model: PreTrainedModel, plan: Plan) -> nn.Module:
    return without_a(_lora(model, plan))


def without_a(model: nn.Module) -> nn.Module:
    """Make a LoRA one whose A is not trained, so that nothing but x A is kept for its backward pass (LoRA-FA)."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def _shira(model: PreTrainedModel, plan: Plan) -> nn.Module:
    return with_shira(model, plan.density, "CAUSAL_LM")


def with_shira(model: PreTrainedModel, density: float, task: str) -> nn.Module:
    """Add PEFT's SHiRA: as many entries in all as DPS selects, at random; its `r` is the same for all layers."""
    layers = list(targets(model))
    entries, sides = (sum(measure(layer) for layer in layers) for measure in (_entries, _sides))
    config = ShiraConfig(task_type=task, r=max(1, round(density * entries / sides)))
    config.target_modules = "all-linear"
    config.mask_fn = _random_mask
    return get_peft_model(model, config)


def _entries(layer: nn.Linear) -> int:
    return layer.in_features * layer.out_features


def _sides(layer: nn.Linear) -> int:
    return layer.in_features + layer.out_features


def _random_mask(layer: nn.Linear, r: int, **_: Any) -> torch.Tensor:
    """Choose entries where the weight is; SHiRA's own mask takes seconds a layer on the CPU."""
    mask = torch.zeros_like(layer.weight).view(-1)
    mask[torch.randperm(mask.numel(), device=mask.device)[: r * _sides(layer)]] = 1.0
    return mask.view_as(layer.weight)


def _dps(*, cast: bool = True, units: bool = False, **fields: Any) -> Prepare:
    def prepare(model: PreTrainedModel, plan: Plan) -> nn.Module:
        size: dict[str, Any] = {"units": plan.units} if units else {"density": plan.density}
        config = DPSConfig(task_type="CAUSAL_LM", stage_steps=plan.stage_steps, **size, **fields)
        return get_peft_model(model, config, autocast_adapter_dtype=cast)

    return prepare


def _compact(**fields: Any) -> Prepare:
    # Units at random: what a step costs does not depend on which they are.
    return _dps(storage="compact", schedule="once", score="random", score_steps=0, train_bias=False, **fields)


def _compact_scoring(model: PreTrainedModel, plan: Plan) -> nn.Module:
    config = DPSConfig.compact(task_type="CAUSAL_LM", units=plan.units, score_steps=_FOREVER)
    return get_peft_model(model, config)


# A new method is one line here. Those come first that have to be measured where time is short.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(FULL, "everything, bf16", _full),
        Method("lora", "two factors a linear layer, fp32", _lora),
        Method("columns-units", "16 columns a linear layer, fp32", _compact(granularity="column", units=True)),
        Method("columns", "columns of linear layers, fp32", _compact(granularity="column")),
        Method("dps", "linear layers, fp32", _dps(), stages=True),
        Method("lora-fa", "one factor a linear layer, fp32", _lora_fa),
        Method("shira", "random entries of linear layers, fp32", _shira),
        Method("full-linear-fp32", "linear layers, fp32", _linear(torch.float32)),
        Method("mix", "linear layers, fp32", _dps(variant="mix"), stages=True),
        Method("scoring", "nothing: columns of linear layers are scored", _compact_scoring),
        Method("dps-bf16", "linear layers, bf16", _dps(cast=False), stages=True),
        Method("full-linear-bf16", "linear layers, bf16", _linear(torch.bfloat16)),
        Method("rows", "rows of linear layers, fp32", _compact(granularity="row")),
        Method(
            "dps-bf16-scores", "linear layers, bf16, scores in bf16", _dps(cast=False, score_dtype="bfloat16"), True
        ),
    )
}
