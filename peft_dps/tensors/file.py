"""Tensors in a file instead of memory."""

from __future__ import annotations

import tempfile

import torch

from peft_dps.errors import EngineError


def on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """Write a tensor to a temporary file, and map it from there.

    The file has no name any more: its space is free again when the last tensor that uses it is gone. It lies where
    `tempfile` puts files (`TMPDIR`), which should be a disk and not memory. No file stays open.

    Args:
        tensor: Any dtype, on any device that holds data.

    Returns:
        A tensor on the CPU of the same values, dtype, shape and strides. Nothing of it is memory of this process until
        it is read; the system may drop its pages then, and reads them again when they are asked for.

    Raises:
        EngineError: If it cannot be written.
    """
    dense = tensor.detach().cpu()
    strides = torch.empty_like(dense, device="meta").stride()
    if dense.stride() != strides:  # a view with gaps
        dense = dense.clone()
    content = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
    try:
        # Written as a file: through the mapping it would all be in memory, and a full disk would end the process.
        with tempfile.NamedTemporaryFile(prefix="peft_dps-") as file:
            file.write(content)
            file.flush()
            flat = torch.from_file(file.name, shared=True, size=dense.numel(), dtype=dense.dtype)
    except OSError as error:
        raise EngineError(
            f"{tensor.nbytes / 2**20:.0f} MiB cannot be written into {tempfile.gettempdir()!r}: {error}. Set TMPDIR "
            "to a folder on a larger disk, or leave `offload_base` and `lean` out."
        ) from error
    return flat.as_strided(dense.shape, strides)
