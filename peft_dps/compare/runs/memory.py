"""Memory of the device or of the process: what is held, and what was held at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory that is held from now on, above what is held now.

    On a CPU it is the process's peak, so what was held and freed before counts too: make it first, in a new process.

    Attributes:
        kind: "cuda" or "resident".
    """

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "resident"
        _warm_up("cuda" if self.kind == "cuda" else "cpu")
        self._before = 0
        self._before = self.live
        self.reset()

    @property
    def live(self) -> int:
        """What is held now, in bytes. On a GPU kernels may still use more, so no waiting for it is needed."""
        return (torch.cuda.memory_allocated() if self.kind == "cuda" else resident()) - self._before

    @property
    def peak(self) -> int:
        """The peak so far, in bytes."""
        return (torch.cuda.max_memory_allocated() if self.kind == "cuda" else peak_resident()) - self._before

    def reset(self) -> None:
        """Let the peak begin anew from what is held now; that of a process goes on."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()


def _warm_up(device: str) -> None:
    """Train something small: what libraries load and keep when they are first used is not the method's."""
    layer = torch.nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(2):
        layer(torch.ones(64, 64, device=device)).square().mean().backward()
        optimizer.step()


def resident() -> int:
    """Return the memory that this process holds now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Return the most memory that this process has held, in bytes."""
    if _STATUS.exists():
        # Linux starts ru_maxrss of a new process at that of the process which started it; this value it does not.
        line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
