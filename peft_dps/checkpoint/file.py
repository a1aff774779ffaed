"""Training states as files: safetensors, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_dps.errors import StateError

_HEADER, _DIGEST = "peft_dps", "sha256"
_OFFSETS = "DCP_SHARDING_INFO"  # by which torch.distributed.checkpoint finds which rows of what a file holds


def path_in(folder: str | os.PathLike[str], adapter: str) -> Path:
    """Return where in a checkpoint folder the training state of an adapter lies."""
    return Path(folder) / f"dps_state.{quote(adapter, safe='')}.safetensors"


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> str:
    """Write a training state. What was there before stays until all is written, and also if that fails."""
    path = Path(path)
    check_path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["tensors"].items()}
    header = json.dumps(state["header"])
    digest = _digest(header, tensors)
    labels = {_HEADER: header, _DIGEST: digest, _OFFSETS: json.dumps(_offsets(state["header"], tensors))}
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, part, labels)
        _flush(part)
        part.replace(path)
    except BaseException:  # a full disk, or an interrupt
        part.unlink(missing_ok=True)
        raise
    _flush(path.parent)
    return digest


def check_path(path: Path) -> None:
    """Check that a file can be of that name."""
    if path.is_dir():
        raise StateError(f"`path` must be the name of a file, and '{path}' is a folder. Name a file in it.")


def _offsets(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    rows = {
        f"{name}.{kind}": facts["offset"][0] for name, facts in header["weights"].items() for kind in facts["rows"]
    }
    return {
        name: {"saved_offsets": [rows.get(name, 0), *[0] * (tensor.dim() - 1)]} for name, tensor in tensors.items()
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training state that is in one file."""
    return StateFile(path).read()


class StateFile:
    """A training state in a file, which may be read piece by piece.

    Args:
        path: Name of the file.

    Raises:
        StateError: If there is no such file, or it is damaged, or holds no training state.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._open() as file:
            self._header, self._written = _labels(path, file.metadata())
            self._places = file.metadata().get(_OFFSETS)
        self.header: dict[str, Any] = self._parsed(self._header)
        if not isinstance(self.header, dict):
            raise self._damaged()

    def read(self) -> dict[str, Any]:
        """Read everything, as `state_of` returned it."""
        with self._open() as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(self._header, tensors) != self._written:
            raise self._damaged()
        return {"header": self.header, "tensors": tensors}

    def check(self) -> None:
        """Compare the contents with their digest, one tensor at a time, and the places of rows with the header."""
        empty = {}
        with self._open() as file:
            digest = hashlib.sha256(self._header.encode())
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                _add(digest, name, tensor)
                empty[name] = tensor.to("meta")
        if digest.hexdigest() != self._written or self._parsed(self._places) != _offsets(self.header, empty):
            raise self._damaged()

    def kinds(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return the dtype and the shape of each tensor."""
        with self._open() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (each[:0].dtype, torch.Size(each.get_shape())) for name, each in slices.items()}

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except FileNotFoundError as error:
            raise StateError(f"There is no training state at '{self.path}'.") from error
        except (SafetensorError, OSError) as error:
            raise StateError(
                f"The training state at '{self.path}' is cut off or damaged ({error}). Resume from an earlier "
                "checkpoint."
            ) from error

    def _parsed(self, text: str | None) -> Any:
        try:
            return json.loads(text or "")
        except (ValueError, RecursionError) as error:
            raise self._damaged() from error

    def _damaged(self) -> StateError:
        return StateError(f"The training state at '{self.path}' is damaged. Resume from an earlier checkpoint.")


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
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _flush(path: Path) -> None:
    """Wait until a file, or the entry of a file in its folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
