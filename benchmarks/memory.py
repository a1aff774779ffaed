"""Memory of a process, and of the tensors that a training keeps from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from peft_dps.tuner.adapter import find_controllers

KINDS = ("trained weights", "W0", "other weights", "gradients", "optimizer", "scores", "masks", "snapshots")
# Where the parts of a target weight keep what; anything else that they keep counts as a snapshot.
_KINDS_OF_STATE = {
    "total": "scores",
    "count": "scores",
    "mask": "masks",
    "columns": "masks",
}


def rss() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def tensor_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Add up the bytes of the live tensors of a training by kind.

    Args:
        model: The model, after a step and before its gradients are dropped.
        optimizer: Its optimizer.

    Returns:
        Bytes of each of `KINDS`. "W0" are the pretrained weights that are kept beside their trained copies. Memory
        that several tensors share counts once, for the first of the kinds, and what is mapped from a file not at all.
    """
    found: list[tuple[str, Any]] = []
    for name, parameter in model.named_parameters():
        found += [(_kind(name, parameter), parameter), ("gradients", parameter.grad)]
    found += [("optimizer", value) for state in optimizer.state.values() for value in state.values()]
    for controller in find_controllers(model).values():
        for weight in controller.weights:
            found += [
                (_KINDS_OF_STATE.get(name, "snapshots"), tensor)
                for part in (weight.gathered, weight.noise, weight.frozen, weight)
                for name, value in getattr(part, "__dict__", {}).items()
                for tensor in _tensors(value)
            ]
    sizes = dict.fromkeys(KINDS, 0)
    seen: set[int] = set()
    for kind, value in sorted(found, key=lambda pair: KINDS.index(pair[0])):
        for tensor in _tensors(value):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storage = local.untyped_storage()
            in_file = storage.device.type == "cpu" and storage.filename is not None
            if storage.data_ptr() not in seen and not in_file:
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes


def _kind(name: str, parameter: nn.Parameter) -> str:
    if parameter.requires_grad:
        return "trained weights"
    return "W0" if ".base_layer." in name or ".original_module." in name else "other weights"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Find the tensors in a value: in itself, in a sequence, or in the fields of a plain object."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif type(value).__module__.startswith("peft_dps.") and hasattr(value, "__dict__"):
        yield from _tensors(list(vars(value).values()))
