"""A training state in several files: a part for each process, and an index that says which belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dps.checkpoint.file import StateFile, write
from peft_dps.errors import StateError

_MOST_PROCESSES = 10**5  # as many as names of parts have digits for


def write_part(path: str | os.PathLike[str], state: Mapping[str, Any], save: str, rank: int, size: int) -> None:
    """Write the training state of one process of several, beside what earlier saves have left there."""
    write(part_of(Path(path), save, rank, size), {**state, "header": {**state["header"], "save": save}})


def write_index(path: str | os.PathLike[str], header: Mapping[str, Any], save: str, size: int) -> str:
    """Make the parts of a save the training state at `path`, when all are written; delete those of earlier ones."""
    path = Path(path)
    index = {**header, "weights": {}, "save": save, "size": size}
    digest = write(path, {"header": index, "tensors": {}})
    own = re.compile(rf"\.?{re.escape(path.stem)}\.([0-9a-f]{{16}})-\d+-of-\d+{re.escape(path.suffix)}(\.part)?")
    for entry in path.parent.iterdir():
        found = own.fullmatch(entry.name)
        if found and found[1] != save:
            entry.unlink(missing_ok=True)
    return digest


def drop_part(path: str | os.PathLike[str], save: str, rank: int, size: int) -> None:
    """Delete what one process has written for a save that failed, unless the training state at `path` is that save."""
    path = Path(path)
    try:
        is_complete = find_save(path).name == save
    except StateError:
        is_complete = False
    if not is_complete:
        part_of(path, save, rank, size).unlink(missing_ok=True)


def part_of(path: Path, save: str, rank: int, size: int) -> Path:
    """Return where the training state of one process of several lies."""
    return path.with_name(f"{path.stem}.{save}-{rank:05d}-of-{size:05d}{path.suffix}")


@dataclass(frozen=True)
class Save:
    """The files of one save.

    Attributes:
        name: Name of the save; None if one process has saved.
        paths: Its files, in the order of the processes.
    """

    name: str | None
    paths: list[Path]

    def part(self, rank: int) -> StateFile:
        """Open the file of a process."""
        part = StateFile(self.paths[rank])
        if part.header.get("save") != self.name:
            raise StateError(
                f"'{part.path}' is of another save than the files beside it. Resume from another checkpoint."
            )
        return part


def find_save(path: str | os.PathLike[str]) -> Save:
    """Find the files of a training state."""
    path = Path(path)
    header = StateFile(path).header
    if "size" not in header:
        return Save(header.get("save"), [path])
    save, size = str(header.get("save")), header["size"]
    if not (re.fullmatch("[0-9a-f]{16}", save) and type(size) is int and 0 < size <= _MOST_PROCESSES):
        raise StateError(f"The training state at '{path}' names no files: `save` is {save!r}, `size` {size!r}.")
    return Save(save, [part_of(path, save, rank, size) for rank in range(size)])
