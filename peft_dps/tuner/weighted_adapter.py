"""Adapters as arithmetic: a new adapter from the weighted differences of others to the pretrained weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    """Make the configuration of a combined adapter: the first one's, with the targets of all.

    Raises:
        ConfigError: If they do not hold the same kind of values.
    """
    _require_alike(configs, terms)
    names = {name for name, _ in terms}
    targets = [
        path_in_base(model, key)
        for key, module in model.named_modules()
        if isinstance(module, DPSLayer)
        and not isinstance(module, ParamWrapper)
        and names & {*module.dps_weight, *module.dps_delta}
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
        **_budget(configs),
    )


def _require_alike(configs: Sequence[DPSConfig], terms: Terms) -> None:
    """Refuse to combine what is held in different ways."""
    first, (name, _) = configs[0], terms[0]
    for config, (other, _) in zip(configs, terms, strict=True):
        fields = ["storage", "granularity"] if config.recipe().storage.compact else ["storage"]
        for field in fields:
            mine, its = getattr(first, field), getattr(config, field)
            if mine != its:
                raise ConfigError(
                    f"`adapters` must have the same `{field}`, and {name!r} has {mine!r}, {other!r} {its!r}: there is "
                    "no one form for the values of both. Combine adapters of one kind, or merge one into the base "
                    "model (`merge_and_unload`)."
                )


def _budget(configs: Sequence[DPSConfig]) -> dict[str, Any]:
    """Return a number of units that each layer of the adapters has, for when units are selected anew."""
    without = next((config for config in configs if config.units is None), None)
    if without is not None:
        return {"units": None, "density": without.density, "max_density": without.max_density}
    return {"units": min(config.units for config in configs if config.units is not None)}


@torch.no_grad()
def fill(model: nn.Module, adapter_name: str, terms: Terms) -> None:
    """Write W_new = W0 + sum_i w_i (W_i - W0) into an adapter, for weights, biases and `modules_to_save` alike.

    An adapter that does not train a tensor adds nothing to it. Of compact adapters, units that one of them holds are
    combined, and no whole weight is made.
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
    for module in model.modules():
        if isinstance(module, DPSLayer) and (delta := module.delta(adapter_name)) is not None:
            others = [(own, factor) for name, factor in terms if (own := module.delta(name)) is not None]
            delta.combine(others, module.pretrained_weight)
