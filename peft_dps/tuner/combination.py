"""Adapters as arithmetic: a new adapter from the weighted differences of others to the pretrained weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_dps.errors import ConfigError
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.layers.parameter import ParamWrapper, path_in_base

Recipe = list[tuple[str, float]]


def make_recipe(
    known: Sequence[str], adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> Recipe:
    """Validate what is to be combined.

    Args:
        known: Names of the adapters that exist.
        adapters: Names of the adapters to combine.
        weights: A factor for each.
        adapter_name: Name of the new adapter.
        combination_type: How to combine; only `"linear"` exists.

    Returns:
        Pairs of an adapter's name and its factor.

    Raises:
        ConfigError: If one of them cannot work.
    """
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
    if adapter_name in known:
        raise ConfigError(f"`adapter_name` must be a new name, and there is an adapter {adapter_name!r} already.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"`weights` must be finite numbers, got {list(weights)}.")
    return [(name, float(weight)) for name, weight in zip(adapters, weights, strict=True)]


def combined_config(model: nn.Module, configs: Sequence[DPSConfig], recipe: Recipe) -> DPSConfig:
    """Make the configuration of a combined adapter: the first one's, with the targets of all.

    Args:
        model: The base model with the adapters in it.
        configs: Their configurations, in the order of the recipe.
        recipe: What is combined.
    """
    names = {name for name, _ in recipe}
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
def fill(model: nn.Module, adapter_name: str, recipe: Recipe) -> None:
    """Write W_new = W0 + sum_i w_i (W_i - W0) into an adapter, for weights, biases and `modules_to_save` alike.

    An adapter that does not train a tensor adds nothing to it.

    Args:
        model: The base model with the adapters in it.
        adapter_name: The adapter to write.
        recipe: Pairs of an adapter's name and its factor w_i.
    """
    for new, pretrained, trained in _tensors(model, adapter_name):
        parts = [(trained[name], weight) for name, weight in recipe if name in trained]
        # As (1 - sum w_i) W0 + sum w_i W_i, one adapter with factor 1 comes out to the bit.
        total = (1.0 - math.fsum(weight for _, weight in parts)) * pretrained.to(new)
        for tensor, weight in parts:
            total += weight * tensor.to(new)
        new.copy_(total)


def _tensors(model: nn.Module, adapter: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """Yield each tensor of an adapter, its pretrained value, and those of all adapters by name."""
    for module in model.modules():
        if isinstance(module, DPSLayer):
            for container, pretrained in zip((module.dps_weight, module.dps_bias), module.pretrained(), strict=True):
                if adapter in container and pretrained is not None:
                    yield container[adapter], pretrained, dict(container.items())
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            copies = {name: _floating(copy) for name, copy in module.modules_to_save.items()}
            for path, pretrained in _floating(module.original_module).items():
                yield copies[adapter][path], pretrained, {name: tensors[path] for name, tensors in copies.items()}


def _floating(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {path: tensor for path, tensor in tensors.items() if tensor.is_floating_point()}
