"""The methods that `benchmarks.compact` compares: ways to prepare a model, all for the same linear layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.device_methods import targets, with_shira, without_a
from benchmarks.engine import Evidence, select_now
from benchmarks.models import build_model, load_in_4_bits, make_batch
from benchmarks.settings import DECODER, Settings
from peft_dps import DPSConfig, dps_adapter, recipes

_FOREVER = 10**6  # steps


@dataclass(frozen=True)
class Plan:
    """What methods have in common.

    Attributes:
        settings: Model, batch, optimizer and threads.
        density: Fraction of units or entries that are trained; blocks have their own.
        rank: Rank of LoRA.
        units: Columns of each weight, where a number of them is given.
        checkpointing: Whether activations are computed again in the backward pass.
        four_bits: Folder of the model, which is loaded in 4 bits (NF4) and computes in bf16; None for a model in fp32
            whose weights are made here.
    """

    settings: Settings
    density: float = 0.05
    rank: int = 16
    units: int = 16
    checkpointing: bool = False
    four_bits: Path | None = None

    @property
    def task(self) -> str:
        """What PEFT calls the task."""
        return "CAUSAL_LM" if self.settings.kind == DECODER else "SEQ_CLS"


Prepare = Callable[[PreTrainedModel, Plan], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: What flags and tables call it.
        description: One line on it.
        prepare: Makes a freshly built model ready for it.
        is_compact: Whether it is an adapter in compact storage whose units are selected.
    """

    name: str
    description: str
    prepare: Prepare
    is_compact: bool = False

    def build(self, plan: Plan) -> nn.Module:
        """Make the model ready, in training mode."""
        model = build_model(plan.settings) if plan.four_bits is None else load_in_4_bits(plan.settings, plan.four_bits)
        if plan.checkpointing:
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # until 5.22
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
        return self.prepare(model, plan).train()


def _full(model: PreTrainedModel, _: Plan) -> nn.Module:
    return model


def _full_linear(model: PreTrainedModel, _: Plan) -> nn.Module:
    model.requires_grad_(False)
    for module in targets(model):
        module.requires_grad_(True)
    return model


def _lora(model: PreTrainedModel, plan: Plan) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type=plan.task, r=plan.rank, target_modules="all-linear"))


def _lora_fa(model: PreTrainedModel, plan: Plan) -> nn.Module:
    return without_a(_lora(model, plan))


def _shira(model: PreTrainedModel, plan: Plan) -> nn.Module:
    return with_shira(model, plan.density, plan.task)


def _copy(model: PreTrainedModel, plan: Plan) -> nn.Module:
    config = DPSConfig(task_type=plan.task, density=plan.density, schedule="once", score_steps=1)
    return get_peft_model(model, config)


def _scoring(model: PreTrainedModel, plan: Plan) -> nn.Module:
    config = DPSConfig.compact(task_type=plan.task, density=plan.density, score_steps=_FOREVER)
    return get_peft_model(model, config)


def _at_random(name: str, units: int) -> torch.Tensor:
    del name
    return torch.rand(units)


def _upper_first(name: str, units: int) -> torch.Tensor:
    """Prefer what lies higher in the numbered layers of a model, and what comes after all of them."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return torch.full((units,), 1.0 + numbers[0] if numbers else 1000.0)


def _compact(evidence: Evidence = _at_random, *, units: bool = False, **fields: Any) -> Prepare:
    """Compact storage whose units are selected before the first step, so that all steps are of one kind."""

    def prepare(model: PreTrainedModel, plan: Plan) -> nn.Module:
        size: dict[str, Any] = {"units": plan.units} if units else {"density": plan.density}
        config = DPSConfig.compact(task_type=plan.task, score_steps=0, **{**size, **fields})
        prepared = get_peft_model(model, config)
        torch.manual_seed(plan.settings.seed)
        select_now(prepared, evidence)
        return prepared

    return prepare


# A new method is one line here.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "full fine-tuning of every parameter", _full),
        Method("full-linear", "full fine-tuning of the linear layers alone", _full_linear),
        Method("lora", "LoRA", _lora),
        Method("lora-fa", "LoRA with A frozen", _lora_fa),
        Method("columns", "compact, columns", _compact(), True),
        Method("rows", "compact, rows", _compact(granularity="row"), True),
        Method("columns-units", "compact, as many columns as the rank of LoRA", _compact(units=True), True),
        Method("entries", "compact, entries", _compact(granularity="entry"), True),
        Method("blocks", "compact, the upper half", _compact(_upper_first, granularity="block", density=0.5), True),
        Method("scoring", "compact, columns, while it scores", _scoring),
        Method("shira", "SHiRA, as many entries as `columns`", _shira),
        Method("copy", "DPS with copies of the weights, entries", _copy),
    )
}
# `full-linear` is left out: with a large decoder it needs a group of processes of its own.
USUAL = tuple(name for name in METHODS if name != "full-linear")
REFERENCES = ("full", "lora", "lora-fa")  # what step times are held against
RECIPES = {f"recipe:{name}": getattr(recipes, name) for name in recipes.__all__}
_STEPS = 2  # of a phase, so that warming up sees a selection


def find_method(name: str) -> Method:
    """Return the method of that name, which may be a recipe."""
    if name in METHODS:
        return METHODS[name]
    recipe = RECIPES[name]
    summary = str(recipe.__doc__).partition("\n")[0].rstrip(".")
    return Method(name, summary, _by_recipe(recipe), recipe().storage == "compact")


def _by_recipe(recipe: Callable[..., DPSConfig]) -> Prepare:
    """As the recipe says, but for phases so short that a few steps see a selection."""

    def prepare(model: PreTrainedModel, plan: Plan) -> nn.Module:
        config = recipe(task_type=plan.task)
        if config.schedule == "cycle":
            config.schedule = "once"  # a mask holds in the steps that are measured
        if not isinstance(config.stage_steps, int):
            config.stage_steps = _STEPS
        if config.schedule in ("once", "every"):
            config.score_steps = min(config.score_steps, 1)
        prepared = get_peft_model(model, config)
        if dps_adapter(prepared).awaits_scores:
            prepared.dps_score([make_batch(plan.settings)])
        return prepared

    return prepare
