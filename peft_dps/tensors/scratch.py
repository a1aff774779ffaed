"""Memory for what is used at once: on a CPU new memory of that size costs more than computing what is in it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch


class Scratch(threading.local):
    """Buffers of this thread, one per use and dtype, as large as what was asked for so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, use: str) -> torch.Tensor:
        """Return memory on the CPU that the next call for the same use may hand out again."""
        size = math.prod(shape)
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # else nobody may write into it outside of that mode
                buffer = self._buffers[use, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return buffer[:size].view(shape)

    def like(self, tensor: torch.Tensor, use: str) -> torch.Tensor:
        """Return memory of a tensor's shape and dtype, new on an accelerator, whose allocator is fast."""
        if tensor.device.type != "cpu":
            return torch.empty_like(tensor)
        return self.empty(tensor.shape, tensor.dtype, use)


scratch = Scratch()
