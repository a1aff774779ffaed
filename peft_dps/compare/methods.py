"""Fine-tuning methods to compare. A method turns a pretrained model into one that is ready to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_dps.config import DPSConfig
from peft_dps.dropout import disable_dropout

Prepare = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        name: What the command line calls it.
        title: What tables and figures call it.
        prepare: Makes a pretrained model ready to train.
    """

    name: str
    title: str
    prepare: Prepare


METHODS: dict[str, Method] = {}


def register_method(name: str, title: str) -> Callable[[Prepare], Prepare]:
    """Register a function as the method that the command line calls `name`.

    Args:
        name: The name; a method that has it already is replaced.
        title: What tables and figures call it.

    Returns:
        A decorator that returns its function unchanged.
    """

    def register(prepare: Prepare) -> Prepare:
        METHODS[name] = Method(name, title, prepare)
        return prepare

    return register


@register_method("full", "full fine-tuning")
def full(model: PreTrainedModel) -> nn.Module:
    """Train every parameter of the model."""
    return model


@register_method("dps-dense", "DPS Dense")
def dps_dense(model: PreTrainedModel) -> nn.Module:
    """Train every parameter, the weights of linear layers by DPS Dense with its default density and stages.

    The subnetwork is chosen over all weights together, so that the figure can show which layers it falls on.
    """
    return get_peft_model(model, DPSConfig(task_type="SEQ_CLS", scope="model", train_remaining=True))


@register_method("dps-mix", "DPS Mix")
def dps_mix(model: PreTrainedModel) -> nn.Module:
    """Train like DPS Dense, but by DPS Mix and without dropout, as the paper does."""
    disable_dropout(model)
    return get_peft_model(model, DPSConfig(variant="mix", task_type="SEQ_CLS", scope="model", train_remaining=True))
