"""The result file: one JSON line per record, written so that a kill at any moment loses at most the record in hand."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_dps.compare.runs.run import Run, Timing, from_json, to_json

_logger = logging.getLogger(__name__)


@dataclass
class Results:
    """What a result file holds.

    Attributes:
        runs: The runs by key, in the order of the file. A failed run that was tried again counts as it came out last.
        timings: The interleaved step times.
        damaged: Numbers of the lines that are no records, from 1.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)

    def add(self, run: Run) -> None:
        """Add a run, unless it is there and did not fail."""
        earlier = self.runs.get(run.plan.key)
        if earlier is None or earlier.failed:
            self.runs[run.plan.key] = run

    @property
    def reported(self) -> list[Run]:
        """The runs to report, failed ones included: those of phase "test"."""
        return [run for run in self.runs.values() if run.plan.phase == "test"]


def append(record: Run | Timing, path: Path) -> None:
    """Append a record to the file and see it onto the disk.

    A line that was cut when its writer was killed is closed first, so that nothing is glued to it.

    Args:
        record: What to append.
        path: The file; it is made with its folders if it does not exist.

    Raises:
        OSError: It cannot be written; the disk is full, for one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        line = to_json(record).encode() + b"\n"
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Results:
    """Read a result file; one that does not exist is empty.

    Lines that are no records, as a line cut in the middle, are left out with a warning that names them.
    """
    results = Results()
    if not path.exists():
        return results
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = from_json(line.decode())
        except ValueError as error:  # JSON and UTF-8 errors are among them
            results.damaged.append(number)
            _logger.warning("%s, line %d is no record and is left out: %s", path, number, error)
            continue
        if isinstance(record, Timing):
            results.timings.append(record)
        else:
            results.add(record)
    return results


def merge(parts: Sequence[Results]) -> Results:
    """Put the contents of several result files together; of a run that is in several, one counts.

    Numbers of damaged lines are left out: they are those of a file.
    """
    whole = Results(timings=[timing for part in parts for timing in part.timings])
    for part in parts:
        for run in part.runs.values():
            whole.add(run)
    return whole
