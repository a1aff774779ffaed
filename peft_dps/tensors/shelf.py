"""Bytes that wait in a file until they are needed again."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from peft_dps.errors import EngineError


@dataclass(frozen=True)
class Piece:
    """Where a piece is.

    Attributes:
        file: Descriptor of the file.
        place: Where in the file it begins.
        size: Its bytes.
    """

    file: int
    place: int
    size: int


class Shelf:
    """One temporary file for many pieces, since a process may not have a file open for each weight.

    It lies where `tempfile` puts files (`TMPDIR`), has no name, and is gone with the process. Room that is freed is
    given to the next piece of the same size: weights keep their sizes, so the file does not grow from cycle to cycle.
    A process that was forked reads what its parent wrote, and writes into a file of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the garbage collector may free a piece while one is put
        self._owner: int | None = None
        self._file = -1
        self._end = 0
        self._freed: dict[int, list[int]] = {}

    def put(self, content: memoryview) -> Piece:
        """Write a piece.

        Args:
            content: Its bytes.

        Raises:
            EngineError: If it cannot be written.
        """
        written = 0
        try:
            piece = self._reserve(len(content))
            while written < piece.size:
                written += os.pwrite(piece.file, content[written:], piece.place + written)
        except OSError as error:
            raise EngineError(
                f"{len(content) / 2**20:.0f} MiB cannot be written into {tempfile.gettempdir()!r}: {error}. Set "
                "TMPDIR to a folder on a larger disk, or use `lean=False`."
            ) from error
        return piece

    def get(self, piece: Piece) -> bytearray:
        """Return the bytes of a piece.

        Raises:
            EngineError: If the file has lost them.
        """
        content = bytearray(piece.size)
        self.read(piece, 0, memoryview(content))
        return content

    def read(self, piece: Piece, start: int, into: memoryview) -> None:
        """Read a part of a piece.

        Args:
            piece: The piece.
            start: Where in it the part begins.
            into: Memory for the part, as many bytes as it has.

        Raises:
            EngineError: If the file has lost it.
        """
        read = 0
        while read < len(into):
            count = os.preadv(piece.file, [into[read:]], piece.place + start + read)
            if count == 0:
                raise EngineError("A temporary file of this process was cut short by something else.")
            read += count

    def free(self, piece: Piece) -> None:
        """Give up the room of a piece."""
        with self._lock:
            if piece.file == self._file:
                self._freed.setdefault(piece.size, []).append(piece.place)

    def _reserve(self, size: int) -> Piece:
        with self._lock:
            if self._owner != os.getpid():
                self._file, name = tempfile.mkstemp(prefix="peft_dps-")
                Path(name).unlink()
                self._owner, self._end, self._freed = os.getpid(), 0, {}
            freed = self._freed.get(size)
            if freed:
                return Piece(self._file, freed.pop(), size)
            self._end += size
            return Piece(self._file, self._end - size, size)


shelf = Shelf()
