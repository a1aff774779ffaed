"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write a table whose first two columns are words and the others numbers.

    Args:
        rows: The head, and what is below it.
    """
    head, *body = rows
    aligned = ["---", "---", *("---:" for _ in head[2:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *body)) + "\n"
