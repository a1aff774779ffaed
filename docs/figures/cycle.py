"""Draws docs/images/cycle.svg: what one cycle of DPS Dense does to a weight.

Run by hand from the root of a checkout: python docs/figures/cycle.py
"""

from __future__ import annotations

import random
from pathlib import Path

ROWS, COLUMNS, DENSITY = 5, 8, 0.4
CELL, LEFT, TOP, PITCH = 22, 20, 78, 216
WIDTH, HEIGHT = 2 * LEFT + 2 * PITCH + COLUMNS * CELL, 334
UPDATED, FROZEN, INK = "#2b6cb0", "#e4e9f0", "#1a202c"
IMAGE = Path(__file__).parents[1] / "images" / "cycle.svg"


def text(x: float, y: float, words: str, size: int = 15, **style: str) -> str:
    """Return one line of text, in the middle unless `anchor` says otherwise."""
    anchor, weight = style.get("anchor", "middle"), style.get("weight", "normal")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{style.get("fill", INK)}">{words}</text>'
    )


def grid(number: int, fills: list[tuple[str, float]]) -> list[str]:
    """Return the cells of one grid, each a color and its opacity."""
    left = LEFT + number * PITCH
    return [
        f'<rect x="{left + CELL * (place % COLUMNS)}" y="{TOP + CELL * (place // COLUMNS)}" width="{CELL - 2}" '
        f'height="{CELL - 2}" rx="3" fill="{FROZEN if opacity == 0 else color}" fill-opacity="{opacity or 1:.2f}"/>'
        for place, (color, opacity) in enumerate(fills)
    ]


def arrow(number: int) -> str:
    """Return the arrow from one grid to the next."""
    x, y = LEFT + number * PITCH + COLUMNS * CELL + 4, TOP + CELL * ROWS // 2
    return f'<path d="M{x} {y}h26m-8 -7l8 7l-8 7" fill="none" stroke="{INK}" stroke-width="2"/>'


def timeline(top: int) -> list[str]:
    """Return the stages of a training as a bar."""
    width = (WIDTH - 2 * LEFT) / 6
    names = ["ACCUMULATE", "SUBNETWORK"] * 3
    parts = []
    for place, name in enumerate(names):
        x, scores = LEFT + place * width, place % 2 == 0
        fill, ink = (UPDATED, "white") if scores else (FROZEN, INK)
        parts += [
            f'<rect x="{x:g}" y="{top}" width="{width - 2:g}" height="30" rx="3" fill="{fill}"/>',
            text(x + width / 2 - 1, top + 20, name, 11, fill=ink, weight="bold"),
        ]
    for cycle in range(3):
        parts.append(text(LEFT + (2 * cycle + 1) * width, top + 50, f"cycle {cycle + 1}", 14))
    return parts


def draw(path: Path) -> None:
    """Draw the picture and save it as SVG."""
    draws = random.Random(7)
    scores = [draws.random() ** 1.5 for _ in range(ROWS * COLUMNS)]
    count = int(ROWS * COLUMNS * DENSITY)
    best = set(sorted(range(len(scores)), key=scores.__getitem__)[-count:])
    middles = [LEFT + number * PITCH + COLUMNS * CELL / 2 - 1 for number in range(3)]
    captions = [
        ("ACCUMULATE", "updates every entry", ("and adds up its score", "S = S + G * G")),
        ("Select", "darker: higher score", ("the best ceil(n * density)", f"{count} of {len(scores)} at {DENSITY}")),
        ("SUBNETWORK", "updates the selected", ("the others are frozen;", "then the next cycle begins")),
    ]
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>',
        *grid(0, [(UPDATED, 1.0)] * len(scores)),
        *grid(1, [(UPDATED, 0.08 + 0.92 * score) for score in scores]),
        *grid(2, [(UPDATED, 1.0 if place in best else 0.0) for place in range(len(scores))]),
        arrow(0),
        arrow(1),
        *timeline(HEIGHT - 64),
    ]
    for middle, (title, under, below) in zip(middles, captions, strict=True):
        parts += [text(middle, 34, title, 18, weight="bold"), text(middle, 58, under)]
        parts += [text(middle, TOP + CELL * ROWS + 20 * line, words) for line, words in enumerate(below, start=1)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    path.write_text("\n".join([head, *parts, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    draw(IMAGE)
