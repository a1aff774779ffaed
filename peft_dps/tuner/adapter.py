"""The DPS adapters in a model, by name: their status and their training state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_dps.checkpoint import checkpoint
from peft_dps.errors import ConfigError
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.checkpoint.state import load_state, state_of
from peft_dps.training.status import DPSStatus, status_of
from peft_dps.training.controller import Subnetwork


def dps_status(model: nn.Module, adapter_name: str | None = None) -> DPSStatus:
    """Tell what DPS is doing: cycle, stage, entries selected per layer, and whether a frozen entry moved.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        adapter_name: Name of the adapter; None if there is only one.

    Returns:
        A snapshot, printable.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
    """
    return status_of(find_subnetwork(model, adapter_name))


def check_ranks_agree(model: nn.Module, adapter_name: str | None = None) -> None:
    """Compare steps, masks and weights over all processes of a distributed training; all of them have to call it.

    With the environment variable `PEFT_DPS_CHECK_RANKS=1` that happens at every change of stage. It reads every weight
    and communicates 32 bytes for each, so it is meant for finding mistakes. Of weights that FSDP2 has cut, processes
    that hold the same rows are compared.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        adapter_name: Name of the adapter; None if there is only one.

    Raises:
        EngineError: On all processes, if any two differ.
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
    """
    find_subnetwork(model, adapter_name).check_ranks_agree()


def dps_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Take down the training state of an adapter: what an exact resume needs besides weights and optimizer.

    It is the same on all processes of a data-parallel training. Where FSDP2 has sharded the weights, it is that of the
    rows that the process has.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        adapter_name: Name of the adapter; None if there is only one.

    Returns:
        `"header"`, plain values fit for JSON, and `"tensors"`, a flat dict of tensors: scores, or masks in bits. They
        are those in use, as in torch's state dicts: copy what has to outlive the next step.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
    """
    return state_of(find_subnetwork(model, adapter_name))


def load_dps_state_dict(model: nn.Module, state: Mapping[str, Any], adapter_name: str | None = None) -> None:
    """Go on where the training was whose state was taken down: every later weight and mask has the same bits.

    Load the adapter's weights first. Everything is checked before anything is changed. Where FSDP2 has sharded the
    weights, all processes have to call it, each with the state of the same rows.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        state: What `dps_state_dict` returned.
        adapter_name: Name of the adapter; None if there is only one.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
        StateError: If the state is not complete, or not that of this adapter, these settings and these weights.
    """
    load_state(find_subnetwork(model, adapter_name), state)


def save_dps_state(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Save the training state of an adapter to a safetensors file.

    The file appears whole or not at all, also if the process is killed meanwhile. In a data-parallel training one
    process has to save. Where FSDP2 has sharded the weights, all have to call it, with the same path in a folder that
    they share: each writes a file beside it, and the one at `path` comes last and says which belong together.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        path: Name of the file; its folder exists.
        adapter_name: Name of the adapter; None if there is only one.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
        StateError: If it failed on another process.
    """
    checkpoint.save(find_subnetwork(model, adapter_name), path)


def load_dps_state(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Go on where the training was whose state is in a file; see `load_dps_state_dict`.

    Every process loads, however many there are now and however many there were: a state can be cut anew, over another
    number of processes, over several from one, or put together for one.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        path: Name of the file.
        adapter_name: Name of the adapter; None if there is only one.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
        StateError: If the file is missing or damaged, or not that of this adapter, these settings and these weights.
    """
    checkpoint.load(find_subnetwork(model, adapter_name), path)


def offloaded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Collect the pretrained weights that `offload_base=True` keeps in files, for `fully_shard(ignored_params=...)`.

    What FSDP2 cuts over processes it holds in memory and collects with each block; these it is to leave alone.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.

    Returns:
        The parameters of the base layers; none without `offload_base=True`.
    """
    layers = [module for module in model.modules() if isinstance(module, DPSLayer)]
    return {layer.pretrained_parameter for layer in layers if layer.is_offloaded}


def find_subnetwork(model: nn.Module, adapter_name: str | None = None) -> Subnetwork:
    """Return the subnetwork of a DPS adapter.

    Args:
        model: A PEFT model, or any module that holds DPS layers.
        adapter_name: Name of the adapter; None if there is only one.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
    """
    subnetworks = find_subnetworks(model)
    if adapter_name is None and len(subnetworks) == 1:
        return next(iter(subnetworks.values()))
    if adapter_name not in subnetworks:
        raise ConfigError(f"`adapter_name` must be one of {sorted(subnetworks)}, got {adapter_name!r}.")
    return subnetworks[adapter_name]


def find_subnetworks(model: nn.Module) -> dict[str, Subnetwork]:
    """Collect the subnetworks of all DPS adapters in a model, however the adapters were injected.

    Args:
        model: A PEFT model, or any module that holds DPS layers.

    Returns:
        Per adapter name, its subnetwork.

    Raises:
        ConfigError: If two PEFT models in the module have adapters of the same name.
    """
    return _by_name(all_subnetworks(model))


def all_subnetworks(model: nn.Module) -> dict[Subnetwork, str]:
    """Collect the subnetworks of all DPS adapters in a model, also where several have the same name.

    Args:
        model: A PEFT model, or any module that holds DPS layers.

    Returns:
        Per subnetwork, the path of its first layer.
    """
    found: dict[Subnetwork, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, DPSLayer):
            for subnetwork in module.dps_subnetworks.values():
                if isinstance(subnetwork, Subnetwork):
                    found.setdefault(subnetwork, path)
    return found


def _by_name(found: Mapping[Subnetwork, str]) -> dict[str, Subnetwork]:
    named: dict[str, Subnetwork] = {}
    for subnetwork, path in found.items():
        if (other := named.setdefault(subnetwork.adapter, subnetwork)) is not subnetwork:
            raise ConfigError(
                f"Two DPS adapters of this model are called {subnetwork.adapter!r}: one has the layer "
                f"{found[other]!r}, the other {path!r}. Give one another name (`get_peft_model(part, config, "
                "adapter_name=...)`), or ask each part of the model by itself."
            )
    return named


def find_trained(model: nn.Module) -> dict[str, Subnetwork]:
    """Collect the subnetworks of the DPS adapters that are being trained.

    Args:
        model: A PEFT model, or any module that holds DPS layers.

    Returns:
        Per adapter name, its subnetwork.

    Raises:
        ConfigError: If two PEFT models in the module train adapters of the same name.
    """
    return _by_name(
        {
            subnetwork: path
            for subnetwork, path in all_subnetworks(model).items()
            if any(weight.exists() and weight.parameter.requires_grad for weight in subnetwork.weights)
        }
    )
