"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """Write a table whose first columns are words and the others numbers.

    Args:
        rows: The head, and what is below it.
        words: Number of columns that are words.
    """
    head, *body = rows
    aligned = ["---" if column < words else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *body)) + "\n"
