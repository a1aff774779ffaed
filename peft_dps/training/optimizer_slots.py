"""The state that an optimizer keeps of units: it follows those that stay, and is zero for new ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from peft_dps.errors import EngineError
from peft_dps.tensors.shards import Sharding, local_part


def refuse_state(optimizer: Optimizer, parameter: torch.Tensor, shape: torch.Size, name: str) -> None:
    """Refuse an optimizer whose state of a parameter does not tell what belongs to which of its entries.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.
        shape: The shape that it had at the latest step.
        name: What errors call it.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        tensor = isinstance(value, torch.Tensor)
        fits = tensor and value.shape == shape and value.is_floating_point()
        if isinstance(value, (dict, list, tuple)) or (tensor and value.dim() > 0 and not fits):
            what = f"{value.dtype} {list(value.shape)}" if tensor else type(value).__name__
            raise EngineError(
                f"{type(optimizer).__name__} keeps {key!r} as {what} of the weight of {name!r}, whose shape is "
                f"{list(shape)}, so its state cannot follow units that are selected anew. Use an optimizer "
                "that keeps state in the parameter's shape, such as torch.optim.AdamW, or select once, in a new "
                "adapter."
            )


def refuse_early_state(optimizer: Optimizer, parameter: torch.Tensor, name: str) -> None:
    """Refuse an optimizer that keeps state of a parameter which is about to get its units, and another shape."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            raise EngineError(
                f"{type(optimizer).__name__} has made {key!r} of the weight of {name!r} before its first step, when "
                f"it had no units, and has no place for those that are selected now. Use torch.optim.AdamW, "
                "`scope='tensor'`, or score before the optimizer is made (`schedule='once'`, `score_steps=0` and "
                "`model.dps_score(batches)`)."
            )


@torch.no_grad()
def move_slots(
    optimizer: Optimizer,
    parameter: torch.Tensor,
    shape: torch.Size,
    moved: torch.Tensor,
    axis: int,
    sharding: Sharding | None,
) -> None:
    """Move the state of units to their slots.

    Args:
        optimizer: The optimizer.
        parameter: The parameter, which has its units in their slots already.
        shape: The shape that it had at the latest step, which state of its entries has.
        moved: Per slot, the one that its unit had before, -1 for a new unit, which starts with zeros.
        axis: Axis of the slots.
        sharding: How FSDP2 has cut the parameter; units then stay where they are.
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if bool((moved < 0).all()):
        optimizer.state.pop(parameter, None)  # all begin anew, and so do bias corrections
        return
    is_new = moved < 0
    for key, value in _per_entry(state, shape):
        if sharding is not None:
            own = is_new.narrow(0, sharding.first, sharding.rows) if axis == 0 else is_new
            local_part(value).index_fill_(axis, own.nonzero().view(-1).to(value.device), 0.0)
            continue
        taken = value.index_select(axis, moved.clamp(min=0).to(value.device))
        state[key] = taken.index_fill_(axis, is_new.nonzero().view(-1).to(value.device), 0.0)


def _per_entry(state: dict[str, Any], shape: torch.Size) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in list(state.items()):
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == shape:
            yield key, value
