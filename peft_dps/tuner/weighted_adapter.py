"""Adapters as arithmetic: a new adapter from the weighted differences of others to the pretrained weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from peft_dps.errors import ConfigError
from peft_dps.tuner.adapter_name import require_adapter_name
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.layers.parameter import ParamWrapper, path_in_base
from peft_dps.tuner.trained_tensors import trained_tensors

Terms = list[tuple[str, float]]  # names of adapters, and their factors


def make_terms(
    known: Sequence[str], adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> Terms:
    """Validate what is to be combined."""
    if combination_type != "linear":
        raise ConfigError(
            f"`combination_type` must be 'linear', got {combination_type!r}. The differences that DPS trains have "
            "full rank, so there is no decomposition to combine."
        )
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"`adapters` needs one factor each in `weights`, got {len(adapters)} and {len(weights)}.")
    unknown = [name for name in adapters if name not in known]
    if unknown:
        raise ConfigError(f"`adapters` must be some of {sorted(known)}, got {unknown}.")
    require_adapter_name(adapter_name)
    if adapter_name in known:
        raise ConfigError(f"`adapter_name` must be a new name, and there is an adapter {adapter_name!r} already.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"`weights` must be finite numbers, got {list(weights)}.")
    return [(name, float(weight)) for name, weight in zip(adapters, weights, strict=True)]


def combined_config(model: nn.Module, configs: Sequence[DPSConfig], terms: Terms) -> DPSConfig:
    """Make the configuration of a combined adapter: the first one's, with the targets of all."""
    names = {name for name, _ in terms}
    targets = [
        path_in_base(model, key)
        for key, module in model.named_modules()
        if isinstance(module, DPSLayer) and not isinstance(module, ParamWrapper) and names & set(module.dps_weight)
    ]
    parameters = sorted({name for config in configs for name in config.target_parameters or ()})
    saved = sorted({name for config in configs for name in config.modules_to_save or ()})
    return replace(
        configs[0],
        target_modules="|".join(map(re.escape, targets)) or [],  # whole paths: PEFT takes names for ends of paths
        target_parameters=parameters or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved or None,
        train_bias=any(config.train_bias for config in configs),
        train_remaining=any(config.train_remaining for config in configs),
    )


@torch.no_grad()
def fill(model: nn.Module, adapter_name: str, terms: Terms) -> None:
    """Write W_new = W0 + sum_i w_i (W_i - W0) into an adapter, for weights, biases and `modules_to_save` alike.

    An adapter that does not train a tensor adds nothing to it.
    """
    values = {
        name: {(tensor.module, tensor.name): tensor.value for tensor in trained_tensors(model, name)}
        for name, _ in terms
    }
    for new in trained_tensors(model, adapter_name):
        place = new.module, new.name
        parts = [(values[name][place], weight) for name, weight in terms if place in values[name]]
        # As (1 - sum w_i) W0 + sum w_i W_i, one adapter with factor 1 comes out to the bit.
        total = (1.0 - math.fsum(weight for _, weight in parts)) * new.pretrained.to(new.value)
        for tensor, weight in parts:
            total += weight * tensor.to(new.value)
        new.value.copy_(total)
