"""A table: rows of text under a header, for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text


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
        """Return a table with a row for each of the items and, per column, what makes its cell."""
        rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
        return cls(title, tuple(columns), rows, **fields)

    def to_rich(self) -> rich.table.Table:
        """Return the table for the terminal."""
        caption = Text("\n".join(self.notes))
        table = rich.table.Table(title=Text(self.title), caption=caption, caption_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for index, row in enumerate(self.rows):
            table.add_row(*map(Text, row), style="bold" if index in self.best else None)
        return table

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
