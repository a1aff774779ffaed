"""Memory that evidence, frozen bits and snapshots of one weight use in turns: new memory is slow on a CPU."""

from __future__ import annotations

import torch


class SpareMemory:
    """Keeps what a phase leaves until the next one takes it."""

    def __init__(self) -> None:
        self._spare: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_spare": None}

    def give(self, memory: torch.Tensor | None) -> None:
        """Keep memory that is not used any more."""
        self._spare = self._spare if memory is None else memory

    def fitting(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the memory as a tensor of this dtype, if it has the layout of `like`; it may be taken again."""
        spare = self._spare
        if spare is None or spare.itemsize != dtype.itemsize:
            return None
        alike = spare.shape == like.shape and spare.stride() == like.stride() and spare.device == like.device
        return spare.view(dtype) if alike else None

    def take(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the memory if it fits, else new memory."""
        memory = self.fitting(like, dtype)
        self._spare = None
        return torch.empty_like(like.detach(), dtype=dtype) if memory is None else memory

    def drop(self) -> None:
        """Free the memory, if nothing has taken it."""
        self._spare = None
