"""How numbers are written in the cells of a table."""

from __future__ import annotations

import math

NONE = "-"
_MEBIBYTE = 2**20


def points(score: float | None, *, sign: bool = False, digits: int = 2) -> str:
    """Write a score or a difference times 100.

    Args:
        score: The score; None or NaN where there is none.
        sign: Whether to write a plus.
        digits: Digits after the point.
    """
    if score is None or math.isnan(score):
        return NONE
    return f"{100 * score:{'+' if sign else ''}.{digits}f}"


def p_value(value: float | None) -> str:
    """Write a p value with four digits."""
    if value is None:
        return NONE
    return "<0.0001" if value < 0.00005 else f"{value:.4f}"


def count(value: float | None) -> str:
    """Write a number of things, which as a median may end in a half; infinitely many are "never"."""
    if value is None:
        return NONE
    return "never" if math.isinf(value) else f"{value:,.1f}".removesuffix(".0")


def entries(value: float | None) -> str:
    """Write a number of entries with three digits: 22.7M."""
    if value is None:
        return NONE
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.0f}"


def ratio(value: float | None) -> str:
    """Write how many times something is something else."""
    return NONE if value is None else f"{value:.2f} x"


def seconds(value: float | None) -> str:
    """Write a time in seconds."""
    return NONE if value is None else f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def mebibytes(value: float | None) -> str:
    """Write a number of bytes in MiB."""
    if value is None:
        return NONE
    return f"{value / _MEBIBYTE:,.0f} MiB" if value >= 10 * _MEBIBYTE else f"{value / _MEBIBYTE:.2f} MiB"
