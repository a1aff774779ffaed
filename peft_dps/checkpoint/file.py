"""Training states as files: safetensors, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_dps.errors import StateError

_HEADER, _DIGEST = "peft_dps", "sha256"


def path_in(folder: str | os.PathLike[str], adapter: str) -> Path:
    """Return where in a checkpoint folder the training state of an adapter lies."""
    return Path(folder) / f"dps_state.{quote(adapter, safe='')}.safetensors"


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> str:
    """Write a training state. What was there before stays until all is written, and also if that fails."""
    path = Path(path)
    check_path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["tensors"].items()}
    header = json.dumps(state["header"])
    digest = _digest(header, sorted(tensors.items()))
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, part, {_HEADER: header, _DIGEST: digest})
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


class StateFile:
    """A training state in a file, which may be read piece by piece.

    Args:
        path: Name of the file.

    Attributes:
        header: Its plain values.
        digest: The digest that the file carries.

    Raises:
        StateError: If there is no such file, or it is damaged, or holds no training state.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._open() as file:
            labels = file.metadata() or {}
        if _HEADER not in labels or _DIGEST not in labels:
            raise StateError(f"'{path}' holds no training state of peft_dps.")
        self._header: str = labels[_HEADER]
        self.digest: str = labels[_DIGEST]
        try:
            self.header: dict[str, Any] = json.loads(self._header)
        except (ValueError, RecursionError) as error:
            raise self._damaged() from error
        if not isinstance(self.header, dict):
            raise self._damaged()

    def read(self) -> dict[str, Any]:
        """Read everything, as `state_of` returned it."""
        with self._open() as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(self._header, sorted(tensors.items())) != self.digest:
            raise self._damaged()
        return {"header": self.header, "tensors": tensors}

    def check(self) -> None:
        """Compare the contents with their digest, one tensor at a time."""
        with self._open() as file:
            if _digest(self._header, ((name, file.get_tensor(name)) for name in sorted(file.keys()))) != self.digest:
                raise self._damaged()

    def rows(self, name: str, first: int, stop: int | None) -> torch.Tensor:
        """Read rows of a tensor, from the first up to one that is left out; None for all."""
        with self._open() as file:
            found: torch.Tensor = file.get_slice(name)[first:stop]
            return found

    def size(self, name: str) -> torch.Size:
        """Return the shape of a tensor."""
        with self._open() as file:
            return torch.Size(file.get_slice(name).get_shape())

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

    def _damaged(self) -> StateError:
        return StateError(f"The training state at '{self.path}' is damaged. Resume from an earlier checkpoint.")


def digest_of(path: str | os.PathLike[str]) -> str | None:
    """Return the digest that a file carries, without reading its tensors; None if it is no readable state."""
    try:
        return StateFile(path).digest
    except StateError:
        return None


def _digest(header: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Work out the digest of tensors that come in the order of their names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the entry of a file in its folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
