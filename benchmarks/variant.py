"""The variants: plain fine-tuning and DPS, as ways to prepare one and the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.settings import SIZES, Settings
from peft_dps import DPSConfig

Prepare = Callable[[nn.Module, Settings], nn.Module]


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        name: What flags and tables call it.
        description: One line on it.
        prepare: Makes a freshly built model ready for it.
    """

    name: str
    description: str
    prepare: Prepare

    def build(self, settings: Settings) -> nn.Module:
        """Build the model with random weights and prepare it."""
        torch.manual_seed(settings.seed)
        model = BertForSequenceClassification(bert_config(settings))
        return self.prepare(model, settings).train()


def bert_config(settings: Settings) -> BertConfig:
    """Return the configuration of the encoder."""
    return BertConfig(
        **SIZES[settings.size],
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    )


def _train_all(model: nn.Module, _: Settings) -> nn.Module:
    return model


def _train_linear(model: nn.Module, _: Settings) -> nn.Module:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(True)
    return model


def _dps(**fields: Any) -> Prepare:
    def prepare(model: nn.Module, settings: Settings) -> nn.Module:
        config = DPSConfig(
            task_type="SEQ_CLS",
            density=settings.density,
            stage_steps=settings.stage_steps,
            seed=settings.seed,
            **fields,
        )
        return get_peft_model(model, config)

    return prepare


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("full", "full fine-tuning: every parameter is trained", _train_all),
        Variant("full-linear", "full fine-tuning of the linear layers only, those that DPS trains", _train_linear),
        Variant("dps-exact", "DPS on all linear layers, frozen='exact'", _dps(frozen="exact")),
        Variant("dps-gradient", "DPS on all linear layers, frozen='gradient'", _dps(frozen="gradient")),
        Variant("mix-exact", "DPS Mix on all linear layers, frozen='exact'", _dps(variant="mix", frozen="exact")),
        Variant("dps-offloaded", "as dps-exact, with W0 in a file: offload_base=True", _dps(offload_base=True)),
        Variant("mix-offloaded", "as mix-exact, with W0 in a file", _dps(variant="mix", offload_base=True)),
        Variant(
            "dps-remaining",
            "DPS on all linear layers, frozen='exact', every other parameter trained too",
            _dps(frozen="exact", train_remaining=True),
        ),
        Variant(
            "mix-remaining",
            "DPS Mix on all linear layers, frozen='exact', every other parameter trained too",
            _dps(variant="mix", frozen="exact", train_remaining=True),
        ),
    )
}
# Which variant is held against which: first the one that trains the same parameters, then the other.
COMPARISONS: tuple[tuple[str, str], ...] = (
    ("dps-exact", "full-linear"),
    ("dps-gradient", "full-linear"),
    ("mix-exact", "full-linear"),
    ("dps-remaining", "full"),
    ("mix-remaining", "full"),
    ("dps-exact", "full"),
    ("dps-gradient", "full"),
    ("mix-exact", "full"),
)
