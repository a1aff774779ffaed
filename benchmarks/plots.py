"""Figures of the page: stacked bars of memory by kind, and ratios along a sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.findings import SIZE, Entry, Findings
from benchmarks.footprint import ACTIVATIONS
from benchmarks.memory import KINDS
from benchmarks.ratio import TARGETS
from benchmarks.rounds import ACCUMULATE, FIGURES, SUBNETWORK
from benchmarks.variant import DENSE, LEAN_DENSE, LEAN_MIX, MIX, NARROW_DENSE, VARIANTS
from peft_dps.compare.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Style, canvas, headline

# Per setting that is swept, what it is called, and the unit of its values.
SWEEPS = {
    SIZE: ("model size", "trained entries"),
    "batch": ("batch size", "sequences"),
    "tokens": ("sequence length", "tokens"),
    "density": ("density", "density"),
}
STYLES = {
    DENSE: Style(RED, "s", stressed=True),
    MIX: Style(BLUE, "D", stressed=True),
    NARROW_DENSE: Style(ORANGE, "o"),
    LEAN_DENSE: Style(RED, "s", line="--", filled=False),
    LEAN_MIX: Style(BLUE, "D", line="--", filled=False),
}
_COLORS = {
    "trained weights": BLUE,
    "W0": SKY,
    "other weights": "#c6dbef",
    "gradients": ORANGE,
    "optimizer": GREY,
    "scores": GREEN,
    "masks": RED,
    "snapshots": PURPLE,
    ACTIVATIONS: "#e3e3e3",
}
_NAMES = {"full": "full", "full-linear": "full", "lora": "LoRA"}
_MIB = 2**20


def draw_memory(results: Findings) -> Figure:
    """Draw bytes by kind as stacked bars: a panel for each model, a bar for each method and stage.

    Args:
        results: The results.
    """
    entries = [entry for entry in results.models if entry.footprints]
    columns = min(3, len(entries))
    rows = math.ceil(len(entries) / columns)
    with canvas(3.6 * rows + 0.4, 3.6 * columns + 1.6) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(entries) :]:
            axes.set_visible(False)
        for axes, entry in zip(grid.flat, entries, strict=False):
            _draw_bars(axes, entry)
        for axes in grid[:, 0]:
            axes.set_ylabel("MiB")
        headline(figure, "Memory by kind in each stage; marks: peak of such a step")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    return figure


def _draw_bars(axes: Axes, entry: Entry) -> None:
    bars = [
        (
            f"{VARIANTS[variant].method or _NAMES[variant]}{f', {figure}' if VARIANTS[variant].method else ''}",
            found,
            figure,
        )
        for variant, found in entry.footprints.items()
        for figure in ((ACCUMULATE, SUBNETWORK) if VARIANTS[variant].method else (ACCUMULATE,))
    ]
    places = range(len(bars))
    bottoms = [0.0] * len(bars)
    for kind in (*KINDS, ACTIVATIONS):
        heights = [found["kinds"][figure][kind] / _MIB for _, found, figure in bars]
        axes.bar(places, heights, bottom=bottoms, color=_COLORS[kind], width=0.75, label=kind)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    peaks = [found["peaks"][figure] / _MIB for _, found, figure in bars]
    axes.plot(
        places,
        peaks,
        linestyle="none",
        marker="_",
        markersize=min(18, 120 / len(bars)),
        markeredgewidth=2,
        color=BLACK,
        label="peak",
    )
    axes.set_xticks(places, [name for name, _, _ in bars], rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(visible=False, axis="x")
    axes.set_title(entry.title)


@dataclass(frozen=True)
class _Look:
    """How one of several lines of cases is told from the others: by what its name ends in, and by its line."""

    suffix: str
    changed: bool


def draw_sweep(results: Findings, field: str) -> Figure:
    """Draw how the ratios move along a sweep: a panel for each kind of step and for memory, a line for each method.

    Args:
        results: The results.
        field: The setting that is swept.
    """
    _, unit = SWEEPS[field]
    panels: list[tuple[str, Any]] = [
        (figure, lambda entry, variant, f=figure: entry.step(variant, f)) for figure in FIGURES
    ]
    panels.append(("memory", lambda entry, variant: entry.memory(variant)))
    with canvas(3.1, 11) as figure:
        grid = figure.subplots(1, len(panels))
        lines = results.sweeps()[field]
        for place, (name, entries) in enumerate(lines.items()):
            look = _Look(f", {name}" if len(lines) > 1 else "", changed=place > 0)
            for axes, (title, read) in zip(grid, panels, strict=True):
                _draw_lines(axes, entries, field, read, None if title == "memory" else title, look)
                axes.set(title=title, xlabel=unit)
        for axes in grid:
            _set_scale(axes, field, {entry.value(field) for entries in lines.values() for entry in entries})
        grid[0].set_ylabel("beside full fine-tuning")
        named = dict(zip(*reversed(grid[0].get_legend_handles_labels()), strict=True))
        figure.legend(list(named.values()), list(named), loc="outside right center")
        headline(figure, f"By {SWEEPS[field][0]}: medians, bars from quartile to quartile; thin and dashed: aims")
    return figure


def _draw_lines(axes: Axes, entries: list[Entry], field: str, read: Any, figure: str | None, look: _Look) -> None:
    variants = dict.fromkeys(variant for entry in entries for variant in entry.compared if VARIANTS[variant].method)
    for variant in variants:
        method = VARIANTS[variant].method
        style = replace(STYLES[method], line=":", filled=False) if look.changed else STYLES[method]
        points = [(entry.value(field), read(entry, variant), entry) for entry in entries if read(entry, variant)]
        places, ratios = [place for place, _, _ in points], [ratio for _, ratio, _ in points]
        if figure is not None:
            spreads = [entry.spread(variant, figure) for _, _, entry in points]
            ends = [[s["lower"] for s in spreads], [s["upper"] for s in spreads]]
            axes.vlines(places, *ends, color=style.color, linewidth=0.8)
        axes.plot(places, ratios, markersize=4, label=f"{method}{look.suffix}", **{**style.point, **style.curve})
        axes.axhline(TARGETS[method][figure or "memory"], color=style.color, linestyle="--", linewidth=0.7)
    axes.axhline(1.0, color="0.5", linewidth=0.8)


def _set_scale(axes: Axes, field: str, places: set[float]) -> None:
    if field != "density":
        axes.set_xscale("log")
    if field == SIZE:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    else:
        axes.set_xticks(sorted(places), [_short(place) for place in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:g}"
