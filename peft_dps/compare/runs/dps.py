"""What DPS says of itself in a model: the only place of the comparison that asks it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from peft_dps import DPSConfig, DPSStatus, dps_state_dict, dps_status

Masks = dict[str, np.ndarray]
"""Per path of a layer, its mask in bits."""


def status_of(model: nn.Module) -> DPSStatus | None:
    """Return the status of the model's DPS adapter; None without one."""
    return dps_status(model) if _configs(model) else None


def masks_of(model: nn.Module) -> Masks:
    """Return the masks that are in force. A layer of which every entry is selected has none."""
    tensors = dps_state_dict(model)["tensors"]
    masks = {name.removesuffix(".mask"): tensor for name, tensor in tensors.items() if name.endswith(".mask")}
    return {name: tensor.cpu().numpy().copy() for name, tensor in masks.items()}


def set_stage_steps(model: nn.Module, steps: int) -> None:
    """Set the length of a stage, before the first step of a training; nothing happens without DPS."""
    for config in _configs(model):
        config.stage_steps = steps


def _configs(model: nn.Module) -> list[DPSConfig]:
    """The configurations of DPS in a model, also in one that an engine has wrapped; one may come twice."""
    found: list[Any] = [config for part in model.modules() for config in getattr(part, "peft_config", {}).values()]
    return [config for config in found if isinstance(config, DPSConfig)]
