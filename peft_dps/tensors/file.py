"""Tensors in a file instead of memory."""

from __future__ import annotations

import errno
import os
import tempfile

import torch

from peft_dps.errors import EngineError


def on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """Write a tensor to a temporary file, and map it from there.

    The file has no name any more: its space is free again when the last tensor that uses it is gone. It lies where
    `tempfile` puts files (`TMPDIR`), which should be a disk and not memory.

    Args:
        tensor: Any dtype, on any device that holds data.

    Returns:
        A tensor on the CPU of the same values, dtype, shape and strides. The system may drop its pages from memory,
        and reads them again when they are asked for.

    Raises:
        EngineError: If there is no room for it.
    """
    with tempfile.NamedTemporaryFile(prefix="peft_dps-") as file:
        _reserve(file.fileno(), tensor.nbytes)
        flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return flat.as_strided(tensor.shape, strides).copy_(tensor.detach())


def _reserve(file: int, size: int) -> None:
    """Make sure of the room on the disk: where it lacks, writing through a mapping ends the process."""
    try:
        if size > 0 and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return  # a file system that cannot reserve
        raise EngineError(
            f"There is no room for {size / 2**20:.0f} MiB of weights in {tempfile.gettempdir()!r}. Set TMPDIR to a "
            "folder on a larger disk, or leave `offload_base` and `lean` out."
        ) from error
