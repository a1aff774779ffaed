"""The variants: plain fine-tuning, LoRA and DPS, as ways to prepare one and the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.models import build_model
from benchmarks.settings import DECODER, Settings
from peft_dps import DPSConfig

Prepare = Callable[[PreTrainedModel, Settings], nn.Module]
DENSE, MIX, LEAN_DENSE, LEAN_MIX = "DPS Dense", "DPS Mix", "DPS Dense, lean", "DPS Mix, lean"
NARROW_DENSE = "DPS Dense, bf16"


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        name: What flags and tables call it.
        description: One line on it.
        prepare: Makes a freshly built model ready for it.
        against: Which variants it is held against, first the one that trains the same parameters.
        method: What DPS does in it, one of the names above, by which it has its targets; None without DPS.
    """

    name: str
    description: str
    prepare: Prepare
    against: tuple[str, ...] = ()
    method: str | None = None

    def build(self, settings: Settings) -> nn.Module:
        """Build the model with random weights and prepare it, on its device and in training mode."""
        return self.prepare(build_model(settings), settings).train()


def _train_all(model: PreTrainedModel, _: Settings) -> nn.Module:
    return model


def _train_linear(model: PreTrainedModel, _: Settings) -> nn.Module:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.requires_grad_(True)
    return model


def _lora(model: PreTrainedModel, settings: Settings) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type=_task(settings), r=8, target_modules="all-linear"))


def _dps(**fields: Any) -> Prepare:
    def prepare(model: PreTrainedModel, settings: Settings) -> nn.Module:
        config = DPSConfig(
            task_type=_task(settings),
            density=settings.density,
            stage_steps=settings.stage_steps,
            seed=settings.seed,
            **fields,
        )
        return get_peft_model(model, config)

    return prepare


def _task(settings: Settings) -> str:
    return "CAUSAL_LM" if settings.kind == DECODER else "SEQ_CLS"


def _linear(name: str, description: str, method: str, **fields: Any) -> Variant:
    """DPS on the linear layers, nothing else trained."""
    return Variant(name, f"{description} on all linear layers", _dps(**fields), ("full-linear", "full"), method)


def _remaining(name: str, description: str, method: str, **fields: Any) -> Variant:
    """DPS on the linear layers, every other parameter trained too."""
    description = f"{description} on all linear layers, every other parameter trained too"
    return Variant(name, description, _dps(train_remaining=True, **fields), ("full",), method)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("full", "full fine-tuning: every parameter is trained", _train_all),
        Variant("full-linear", "full fine-tuning of the linear layers only, those that DPS trains", _train_linear),
        Variant("lora", "LoRA, r = 8, on all linear layers", _lora, ("full", "full-linear")),
        _linear("dps-exact", "DPS Dense, frozen='exact',", DENSE),
        _linear("dps-gradient", "DPS Dense, frozen='gradient',", DENSE, frozen="gradient"),
        _linear("mix-exact", "DPS Mix, frozen='exact',", MIX, variant="mix"),
        _linear("dps-offloaded", "DPS Dense, offload_base=True,", DENSE, offload_base=True),
        _linear("mix-offloaded", "DPS Mix, offload_base=True,", MIX, variant="mix", offload_base=True),
        _remaining("dps-remaining", "DPS Dense, frozen='exact',", DENSE),
        _remaining("mix-remaining", "DPS Mix, frozen='exact',", MIX, variant="mix"),
        _remaining(
            "dps-narrow",
            "DPS Dense, score_dtype='bfloat16', frozen='gradient',",
            NARROW_DENSE,
            score_dtype="bfloat16",
            frozen="gradient",
        ),
        _remaining("dps-lean", "DPS Dense, lean=True,", LEAN_DENSE, lean=True),
        _remaining("mix-lean", "DPS Mix, lean=True,", LEAN_MIX, variant="mix", lean=True),
    )
}
# Which variant is held against which: first each with the one that trains the same parameters, then with the others.
COMPARISONS: tuple[tuple[str, str], ...] = tuple(
    sorted(
        ((name, other) for name, variant in VARIANTS.items() for other in variant.against),
        key=lambda pair: VARIANTS[pair[0]].against.index(pair[1]),
    )
)
