"""Tensors in a file instead of memory."""

from __future__ import annotations

import tempfile

import torch


def on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """Write a tensor to a temporary file, and map it from there.

    The file has no name any more: its space is free again when the last tensor that uses it is gone. It lies where
    `tempfile` puts files (`TMPDIR`), which should be a disk and not memory.

    Args:
        tensor: Any dtype, on any device that holds data.

    Returns:
        A tensor on the CPU of the same values, dtype, shape and strides. The system may drop its pages from memory,
        and reads them again when they are asked for.
    """
    with tempfile.NamedTemporaryFile(prefix="peft_dps-") as file:
        flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return flat.as_strided(tensor.shape, strides).copy_(tensor.detach())
