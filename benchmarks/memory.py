"""Memory of a process, and of the tensors that a training keeps from step to step."""

from __future__ import annotations

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from peft_dps.adapters import find_subnetworks, offloaded_parameters
from peft_dps.masks import Mask

KINDS = ("trained weights", "W0", "other weights", "gradients", "optimizer", "scores", "masks", "snapshots")


def rss() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def tensor_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Add up the bytes of the live tensors of a training by kind.

    Args:
        model: The model, after a step and before its gradients are dropped.
        optimizer: Its optimizer.

    Returns:
        Bytes of each of `KINDS`. "W0" are the pretrained weights that are kept beside their trained copies.
    """
    sizes = dict.fromkeys(KINDS, 0)
    in_files = offloaded_parameters(model)
    for name, parameter in model.named_parameters():
        sizes[_kind(name, parameter)] += 0 if parameter in in_files else parameter.nbytes
        sizes["gradients"] += _bytes(parameter.grad)
    for state in optimizer.state.values():
        sizes["optimizer"] += sum(_bytes(value) for value in state.values())
    for subnetwork in find_subnetworks(model).values():
        for weight in subnetwork.weights:
            sizes["scores"] += _bytes(weight.total) + _bytes(weight.participation)
            sizes["masks"] += _bytes(weight.mask) + _bytes(weight.columns)
            sizes["snapshots"] += _bytes(weight.held) + _bytes(weight.snapshot)
    return sizes


def _kind(name: str, parameter: nn.Parameter) -> str:
    if parameter.requires_grad:
        return "trained weights"
    return "W0" if ".base_layer." in name or ".original_module." in name else "other weights"


def _bytes(value: object) -> int:
    return value.nbytes if isinstance(value, (torch.Tensor, Mask)) else 0
