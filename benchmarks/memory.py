"""Memory of a process, and of the tensors that a training keeps from step to step."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from peft_dps.model import find_subnetworks

KINDS = ("trained weights", "W0", "other weights", "gradients", "optimizer", "scores", "masks", "held bits")
_STATUS = Path("/proc/self/status")


def rss() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Return the most bytes that this process has had in memory."""
    if _STATUS.exists():
        # Linux starts ru_maxrss of a new process at that of the process which started it; this value it does not.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tensor_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Add up the bytes of the live tensors of a training by kind.

    Args:
        model: The model, after a step and before its gradients are dropped.
        optimizer: Its optimizer.

    Returns:
        Bytes of each of `KINDS`. "W0" are the pretrained weights that are kept beside their trained copies.
    """
    sizes = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        sizes[_kind(name, parameter)] += parameter.nbytes
        sizes["gradients"] += _bytes(parameter.grad)
    for state in optimizer.state.values():
        sizes["optimizer"] += sum(_bytes(value) for value in state.values())
    for subnetwork in find_subnetworks(model).values():
        for weight in subnetwork.weights:
            sizes["scores"] += _bytes(weight.total)
            sizes["masks"] += _bytes(weight.keep)
            sizes["held bits"] += _bytes(weight.held)
    return sizes


def _kind(name: str, parameter: nn.Parameter) -> str:
    if parameter.requires_grad:
        return "trained weights"
    return "W0" if ".base_layer." in name or ".original_module." in name else "other weights"


def _bytes(value: object) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0
