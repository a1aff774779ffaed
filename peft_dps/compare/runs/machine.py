"""What is computed on, and with which versions."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import peft_dps

PACKAGES = ("peft-dps", "peft", "torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn", "scipy")


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that results depend on, and the fingerprint of our source."""
    return {**versions_of(*PACKAGES), "peft-dps source": _SOURCE}


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of some packages."""
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def source_fingerprint(folder: Path) -> str:
    """Return 12 hex digits of a hash over the names and texts of all Python files in a folder.

    Args:
        folder: The folder; those in it count too.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        text = path.read_text(encoding="utf-8")  # in which all line ends are the same
        digest.update(repr((path.relative_to(folder).as_posix(), text)).encode())
    return digest.hexdigest()[:12]


# Taken when the module is imported: the files can be edited while this process runs what it has loaded.
_SOURCE = source_fingerprint(Path(peft_dps.__file__).parent)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # not installed but on the path, as in a checkout
        return "unknown"


def hardware() -> dict[str, Any]:
    """Return what this process computes on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def synchronize() -> None:
    """Wait until the device has done all that it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return what the processor calls itself."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
