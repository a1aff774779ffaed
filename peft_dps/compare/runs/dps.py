"""What DPS says of itself in a model: the only place of the comparison that asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn

from peft_dps import DPSLayer, DPSStatus, dps_adapter

Masks = dict[str, np.ndarray]
"""Per path of a layer, its mask in bits."""


def status_of(model: nn.Module) -> DPSStatus | None:
    """Return the status of the model's DPS adapter; None without one."""
    if not any(isinstance(module, DPSLayer) for module in model.modules()):
        return None
    return dps_adapter(model).status()


def masks_of(model: nn.Module) -> Masks:
    """Return the masks that are in force. A layer of which every entry is selected has none."""
    masks = dps_adapter(model).masks()
    return {name: np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little") for name, mask in masks.items()}


def score_before_training(model: Any, examples: Iterable[Any], collate: Callable[[list[Any]], Any]) -> None:
    """Score examples one by one, without dropout, if the model's method selects from such before training.

    Args:
        model: A model on its device.
        examples: Tokenized training examples.
        collate: Makes a batch of them.
    """
    if status_of(model) is None or not dps_adapter(model).awaits_scores:
        return
    model.eval()
    model.dps_score({name: each.to(model.device) for name, each in collate([one]).items()} for one in examples)
    model.train()
