"""What the benchmarks take of the package beyond its public names: no other file here does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from peft_dps import unsharded_parameters
from peft_dps.masking.compact.linear import add_columns
from peft_dps.selection.budget import EntryBudget
from peft_dps.selection.optimizer_moments import MomentScores
from peft_dps.selection.topk import SortableScores
from peft_dps.selection.topk import select as select_together
from peft_dps.tensors.difference import byte_planes, encode
from peft_dps.training.weight import TargetWeight
from peft_dps.tuner.adapter import find_controllers
from peft_dps.tuner.trained_tensors import trained_tensors

__all__ = [
    "Evidence",
    "MomentScores",
    "TargetWeight",
    "add_columns",
    "byte_planes",
    "compact_tensors",
    "encode",
    "held_tensors",
    "masks_in_force",
    "select",
    "select_now",
    "target_weights",
    "tensors_in",
    "trained_tensors",
    "unsharded_parameters",
]

Evidence = Callable[[str, int], torch.Tensor]  # the name of a weight and its number of units -> theirs, `[units]`

# Where a weight keeps what, by the objects of its phase and their fields; anything else counts as a snapshot.
_KINDS = {"gathered": "scores", "noise.count": "scores", "noise.drawn": "masks", "frozen.mask": "masks"}


def target_weights(model: nn.Module) -> list[TargetWeight]:
    """Return the weights of all DPS adapters in a model."""
    return [weight for controller in find_controllers(model).values() for weight in controller.weights]


def held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Find what DPS holds from step to step: pairs of its kind, "scores", "masks" or "snapshots", and a tensor."""
    for weight in target_weights(model):
        for part in ("gathered", "noise", "frozen", "memory"):
            value = getattr(weight, part)
            fields = vars(value).items() if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else ()
            for name, field in fields or [(part, value)]:
                kind = _KINDS.get(f"{part}.{name}", _KINDS.get(part, "snapshots"))
                yield from ((kind, tensor) for tensor in tensors_in(field))


def select(scores: torch.Tensor, density: float) -> torch.Tensor:
    """Return the mask of the best-scored entries of one weight."""
    return select_together([SortableScores.of(scores)], EntryBudget(density).count(scores.numel()))[0]


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
    return [weight.frozen.mask.keep.bool() for weight in target_weights(model) if weight.frozen is not None]


def select_now(model: nn.Module, evidence: Evidence) -> None:
    """Let compact adapters with `score_steps=0` select by evidence that is made up, without any pass.

    Args:
        model: The model.
        evidence: Returns the evidence of a weight, of its name and its number of units.
    """
    for controller in find_controllers(model).values():
        for weight in controller.weights:
            sums = weight.gathered
            found = evidence(weight.name, sums.units.count)
            per_entry = sums.units.size == 1
            sums.total = found.float().view(sums.units.shape) if per_entry else found.double()
            weight.observed = 1
        controller.clock.count_scored(True)
        controller.see_batches_scored()


def compact_tensors(model: nn.Module) -> Iterator[tuple[TargetWeight, torch.Tensor, list[torch.Tensor]]]:
    """Find what compact adapters hold: of each weight W0, and the tensors of its units."""
    for weight in target_weights(model):
        delta = weight.layer.delta(weight.adapter)
        if delta is not None:
            yield weight, weight.layer.pretrained_weight(), [*delta.parameters(), *delta.buffers()]
