"""A table: rows of text under a header, for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich import box
from rich.text import Text

from peft_dps.compare.report.formatting import NONE

_FIRST = 24  # characters of the first column, from which its texts take several lines
_BETWEEN = 2  # characters between columns


@dataclass(frozen=True)
class Table:
    """A table as people read it.

    Attributes:
        title: What it shows.
        header: Names of the columns; the first column is text, the others are numbers.
        rows: Cells, as many as columns.
        notes: What is to be read with it, a sentence or more each.
        best: Indices of rows to stress.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    best: frozenset[int] = frozenset()

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Callable[[Any], str]], items: Sequence[Any], **fields: Any) -> Table:
        """Return a table with a row for each of the items and, per column, what makes its cell.

        Columns that have nothing for any of them are left out.
        """
        cells = {name: [cell(item) for item in items] for name, cell in columns.items()}
        kept = {name: column for name, column in cells.items() if set(column) != {NONE}}
        return cls(title, tuple(kept), tuple(zip(*kept.values(), strict=True)), **fields)

    def to_rich(self, width: int) -> Iterator[Text | rich.table.Table]:
        """Return what a terminal shows: title, rows and notes, with columns that do not fit below the others.

        Args:
            width: Characters in a line.
        """
        yield Text(self.title, style="bold")
        names = [row[0] for row in self.rows]
        widths = [min(max(_longest(names), 1), max(_FIRST, _longest(_words([*names, self.header[0]]))))]
        widths += [
            max(_longest(_words([name])), _longest(row[index] for row in self.rows))
            for index, name in enumerate(self.header)
            if index
        ]
        for part in _parts(widths, width):
            table = rich.table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for index in part:
                table.add_column(Text(self.header[index]), justify="right" if index else "left", width=widths[index])
            for number, row in enumerate(self.rows):
                style = "bold" if number in self.best else None
                table.add_row(*(Text(row[index]) for index in part), style=style)
            yield table
        yield from map(Text, self.notes)

    def to_markdown(self) -> str:
        """Return the table in Markdown, with its notes below."""
        lines = [
            _line(map(markdown, self.header)),
            _line("---:" if index else ":---" for index in range(len(self.header))),
        ]
        for index, row in enumerate(self.rows):
            first, *rest = map(markdown, row)
            lines.append(_line([f"**{first}**" if index in self.best else first, *rest]))
        return "\n".join([*lines, "", *(f"{markdown(note)}\n" for note in self.notes)])


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _words(texts: Iterable[str]) -> Iterator[str]:
    return (word for text in texts for word in text.split())


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=1)


def _parts(widths: Sequence[int], width: int) -> list[list[int]]:
    """Split columns into the fewest parts that fit, each with the first column, and all about equally wide."""
    fewest = len(_filled(widths, width))
    narrow = next(limit for limit in range(1, width + 1) if len(_filled(widths, limit)) <= fewest)
    return _filled(widths, narrow)


def _filled(widths: Sequence[int], width: int) -> list[list[int]]:
    """Split columns into parts, each as full as it can be, and of two columns at least."""
    parts, taken = [[0]], widths[0]
    for index in range(1, len(widths)):
        if taken + _BETWEEN + widths[index] > width - 2 and len(parts[-1]) > 1:  # the box has an edge
            parts.append([0])
            taken = widths[0]
        parts[-1].append(index)
        taken += _BETWEEN + widths[index]
    return parts
