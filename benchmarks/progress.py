"""What a benchmark says while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

Tell = Callable[[str], None]
"""Prints a line."""


def begin() -> Tell:
    """Return what prints lines to standard error, each with the seconds since this call."""
    console, start = Console(stderr=True), time.monotonic()

    def tell(text: str) -> None:
        console.print(f"[{time.monotonic() - start:5.0f} s] {text}", markup=False, highlight=False)

    return tell
