"""How methods look in every figure of a report: told apart by colour, and without colour by marker and line."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from peft_dps.compare.methods.choice import variant_of
from peft_dps.compare.methods.table import DROPOUT, NO_DROPOUT
from peft_dps.compare.report.experiment import Experiment

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, GREY = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"),
)
"""Told apart under the common kinds of colour blindness (Okabe and Ito, "Color Universal Design", 2008)."""

WIDTH = 4.5
"""Inches of a figure: on the screen of a phone its letters have about 10 pixels."""
DPI = 150
LINE = 0.18  # inches of a line of text
_RC: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Attributes:
        color: Its colour.
        marker: Shape of its points.
        line: Style of its lines.
        filled: Whether its points are filled.
        stressed: Whether its lines are thick.
    """

    color: str
    marker: str
    line: str = "-"
    filled: bool = True
    stressed: bool = False

    @property
    def point(self) -> dict[str, Any]:
        """Arguments of matplotlib for a point."""
        face = self.color if self.filled else "white"
        return {"marker": self.marker, "color": self.color, "markerfacecolor": face, "markeredgecolor": self.color}

    @property
    def curve(self) -> dict[str, Any]:
        """Arguments of matplotlib for a line."""
        return {"color": self.color, "linestyle": self.line, "linewidth": 2.0 if self.stressed else 1.1}


_KNOWN = {
    "full": Style(BLACK, "o", stressed=True),
    "lora": Style(SKY, "^"),
    "bitfit": Style(PURPLE, "v"),
    "houlsby": Style(GREEN, "P"),
    "pfeiffer": Style(ORANGE, "X"),
    "dps-dense": Style(RED, "s", stressed=True),
    "dps-mix": Style(BLUE, "D", stressed=True),
    "dps-columns": Style(BLUE, "*", stressed=True),
    "random-mask": Style(GREY, "h"),
}
_COLORS, _MARKERS = (GREEN, ORANGE, SKY, PURPLE, RED, BLUE, GREY), "<>pdH8"
# Neighbours differ in both, and no two are the same: 7 and 6 have no common divisor.
OTHERS = [Style(_COLORS[number % 7], _MARKERS[number % 6]) for number in range(42)]


def styles_of(experiments: Sequence[Experiment]) -> dict[str, Style]:
    """Give each method of a report its style. One without dropout looks like the same with it, open and dashed.

    Returns:
        Per variant, its style.
    """
    known, free = dict(_KNOWN), cycle(OTHERS)
    bases: dict[str, Style] = {}
    styles: dict[str, Style] = {}
    for each in (each for experiment in experiments for each in experiment.methods):
        plan = next(iter(each.runs.values())).plan
        name = plan.method.removesuffix(NO_DROPOUT)
        options = {option: value for option, value in plan.options.items() if option != DROPOUT}
        drops = name == plan.method and plan.options.get(DROPOUT, True) is not False
        with_dropout = variant_of(name, options)
        if with_dropout not in bases:
            bases[with_dropout] = known.pop(name) if name in known else next(free)
        style = bases[with_dropout]
        styles[each.variant] = style if drops else replace(style, line="--", filled=False)
    return styles


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """Make a figure that looks the same whatever the user's settings of matplotlib."""
    with matplotlib.style.context("default"), mpl.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG of 128 colours, a quarter of the size; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def label(text: str, width: int = 24) -> str:
    """Return text that matplotlib draws as it is, in lines of at most so many characters."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def headline(figure: Figure, text: str) -> None:
    """Put a title above the whole figure, in as many lines as it needs."""
    lines = label(text, round(12 * figure.get_figwidth()))
    figure.set_figheight(figure.get_figheight() + LINE * (1 + lines.count("\n")))
    figure.suptitle(lines, x=0.01, horizontalalignment="left", fontsize=10)


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Put one legend below the whole figure, which grows by it.

    Args:
        figure: The figure.
        axes: Axes with everything that is to be named, by label.
        columns: Names beside each other.
    """
    handles, names = axes.get_legend_handles_labels()
    rows = [names[index : index + columns] for index in range(0, len(names), columns)]
    lines = sum(1 + max(name.count("\n") for name in row) for row in rows)
    figure.set_figheight(figure.get_figheight() + LINE * (lines + 1))
    # Legends are filled column by column, and names are read row by row.
    order = [index for column in range(columns) for index in range(column, len(names), columns)]
    chosen = [handles[index] for index in order], [names[index] for index in order]
    figure.legend(*chosen, loc="outside lower left", ncols=columns, fontsize=8)
