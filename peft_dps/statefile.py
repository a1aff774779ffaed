"""Training states as files: safetensors, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_dps.errors import StateError

_HEADER, _DIGEST = "peft_dps", "sha256"


def path_in(folder: str | os.PathLike[str], adapter: str) -> Path:
    """Return where in a checkpoint folder the training state of an adapter lies.

    Args:
        folder: The checkpoint folder.
        adapter: Name of the adapter.
    """
    return Path(folder) / f"dps_state.{quote(adapter, safe='')}.safetensors"


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> str:
    """Write a training state. A process that is killed meanwhile leaves what was there before.

    Args:
        path: Name of the file; its folder exists.
        state: What `state_of` returned.

    Returns:
        Digest of the state, by which the file can be told from others.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["tensors"].items()}
    header = json.dumps(state["header"])
    digest = _digest(header, tensors)
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, {_HEADER: header, _DIGEST: digest})
    _flush(part)
    part.replace(path)
    _flush(path.parent)
    return digest


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training state.

    Args:
        path: Name of the file.

    Returns:
        What `state_of` returned, with the tensors on the CPU.

    Raises:
        StateError: If there is no such file, or it is damaged, or holds no training state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header, digest = _labels(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise StateError(f"There is no training state at '{path}'.") from error
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"The training state at '{path}' is cut off or damaged ({error}). Resume from an earlier checkpoint."
        ) from error
    if _digest(header, tensors) != digest:
        raise StateError(f"The training state at '{path}' is damaged. Resume from an earlier checkpoint.")
    return {"header": json.loads(header), "tensors": tensors}


def digest_of(path: str | os.PathLike[str]) -> str | None:
    """Return the digest that a file carries, without reading its tensors; None if it is no readable state."""
    try:
        with safe_open(path, framework="pt") as file:
            return _labels(path, file.metadata())[1]
    except (OSError, SafetensorError, StateError):
        return None


def _labels(path: str | os.PathLike[str], metadata: dict[str, str] | None) -> tuple[str, str]:
    if not metadata or _HEADER not in metadata or _DIGEST not in metadata:
        raise StateError(f"'{path}' holds no training state of peft_dps.")
    return metadata[_HEADER], metadata[_DIGEST]


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the entry of a file in its folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
