"""What the benchmarks take of the package beyond its public names: no other file here does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peft_dps import offloaded_parameters
from peft_dps.adapters import find_subnetworks
from peft_dps.codec import split
from peft_dps.export import FORMS
from peft_dps.loading import own_tensors, saved_tensors
from peft_dps.moments import MomentScores
from peft_dps.packed import pack
from peft_dps.selection import select
from peft_dps.tracked import TrackedWeight

__all__ = [
    "FORMS",
    "MomentScores",
    "TrackedWeight",
    "held_tensors",
    "masks_in_force",
    "offloaded_parameters",
    "own_tensors",
    "pack",
    "saved_tensors",
    "select",
    "split",
    "tensors_in",
    "tracked_weights",
]

# Where a tracked weight keeps what; anything else that it keeps counts as a snapshot.
_KINDS = {"total": "scores", "participation": "scores", "keep": "masks", "mask": "masks", "columns": "masks"}


def tracked_weights(model: nn.Module) -> list[TrackedWeight]:
    """Return the weights of all DPS adapters in a model."""
    return [weight for subnetwork in find_subnetworks(model).values() for weight in subnetwork.weights]


def held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Find what DPS holds from step to step: pairs of its kind, "scores", "masks" or "snapshots", and a tensor."""
    for weight in tracked_weights(model):
        for name, value in vars(weight).items():
            yield from ((_KINDS.get(name.lstrip("_"), "snapshots"), tensor) for tensor in tensors_in(value))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Find the tensors in a value: in itself, in a sequence, or in the fields of a plain object of the package."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif type(value).__module__.startswith("peft_dps.") and hasattr(value, "__dict__"):
        yield from tensors_in(list(vars(value).values()))


def masks_in_force(model: nn.Module) -> list[torch.Tensor]:
    """Return the masks of this SUBNETWORK stage, in the order of the weights; none in ACCUMULATE."""
    return [weight.keep.bool() for weight in tracked_weights(model) if weight.keep is not None]
