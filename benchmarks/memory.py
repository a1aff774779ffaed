"""Memory of the tensors that a training keeps from step to step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.engine import held_tensors, tensors_in

KINDS = ("trained weights", "W0", "other weights", "gradients", "optimizer", "scores", "masks", "snapshots")


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
    found += held_tensors(model)
    sizes = dict.fromkeys(KINDS, 0)
    seen: set[int] = set()
    for kind, value in sorted(found, key=lambda pair: KINDS.index(pair[0])):
        for tensor in tensors_in(value):
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
