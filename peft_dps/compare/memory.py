"""Memory that a training takes, of the device or of the process."""

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
        if self.kind == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _warm_up()
            self._before = psutil.Process().memory_info().rss

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        now = torch.cuda.max_memory_allocated() if self.kind == "cuda" else peak_resident()
        return now - self._before


def _warm_up() -> None:
    """Train something small: the code of the libraries comes into memory when it is used, and is not the method's."""
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(2):
        layer(torch.ones(64, 64)).square().mean().backward()
        optimizer.step()


def peak_resident() -> int:
    """Return the most memory that this process has held, in bytes."""
    if _STATUS.exists():
        # Linux starts ru_maxrss of a new process at that of the process which started it; this value it does not.
        line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
