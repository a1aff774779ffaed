"""The machine and the versions, in general terms: no host name, no paths."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

import peft_dps

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, object]:
    """Return what a reader needs to judge the figures by."""
    return {
        "system": platform.system(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are measured."""
    versions = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **versions, "peft_dps": peft_dps.__version__}


def load() -> float:
    """Return how many processes have wanted a core over the last minute, the benchmark's own included."""
    return round(float(psutil.getloadavg()[0]), 2)


def _cpu() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
