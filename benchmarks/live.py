"""Memory as torch's allocators see it: bytes that are alive now, and at most."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_dps.compare.runs.memory import PeakMemory


class Meter(Protocol):
    """Counts live bytes."""

    @property
    def live(self) -> int:
        """Bytes that are alive now."""

    @property
    def peak(self) -> int:
        """Most bytes that were alive at a time since the last `reset`."""

    def reset(self) -> None:
        """Let the peak begin anew from what is alive now."""


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators have made or taken and that are still alive.

    It works on any device, and counts the same on every machine. What it misses are temporary buffers inside of
    kernels. Memory that tensors share counts once, and what is mapped from a file not at all. Of a sparse tensor those
    parts count that operators make or take by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset(self) -> None:
        """Let the peak begin anew from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((output, args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self._see(leaf.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known or (storage.device.type == "cpu" and storage.filename is not None):
            return  # seen before, or mapped from a file
        key, size = id(storage), storage.nbytes()

        def forget(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def meter_of(device: str) -> AbstractContextManager[Meter]:
    """Return a context in which live bytes on a device are counted; enter it before the model is built.

    Args:
        device: "cpu" or "cuda".
    """
    return nullcontext(PeakMemory()) if device == "cuda" else LiveTensors()
