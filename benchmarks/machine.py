"""The machine and the versions, in general terms: no host name, no paths."""

from __future__ import annotations

import platform

import psutil
import torch

import peft_dps
from peft_dps.compare.runs.machine import cpu_name, versions_of


def describe_machine() -> dict[str, object]:
    """Return what a reader needs to judge the figures by."""
    return {
        "system": platform.system(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are measured."""
    versions = versions_of("torch", "transformers", "peft", "accelerate", "numpy")
    return {**versions, "peft_dps": peft_dps.__version__}


def load() -> float:
    """Return how many processes have wanted a core over the last minute, the benchmark's own included."""
    return round(float(psutil.getloadavg()[0]), 2)
