"""The figure of a comparison: loss by step with DPS's stages shaded, and what DPS selected by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peft_dps.compare.run import Run, Span

SMOOTHING_STEPS = 9
COLORS = ("#4c566a", "#bf5b17", "#386cb0", "#1b9e77", "#7570b3")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the figure and save it as PNG.

    Args:
        runs: One run of each method; those of DPS have stages and selections.
        path: Where to save it.
    """
    colors = dict(zip((run.title for run in runs), cycle(COLORS)))
    dps = [run for run in runs if run.selections]
    rows = max((len(run.selections[-1].fraction) for run in dps), default=0)
    figure = Figure(figsize=(10, 4 + bool(dps) + 0.15 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [4, 1 + 0.15 * rows] if dps else [4]
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    _draw_losses(axes[0], runs, colors)
    if dps:
        _draw_selected(axes[1], dps, colors)
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Axes, runs: Sequence[Run], colors: Mapping[str, str]) -> None:
    for run in runs:
        steps = np.arange(1, len(run.losses) + 1)
        axes.plot(steps, _smooth(run.losses), color=colors[run.title], label=run.title)
    shaded: list[Span] = next((run.stages for run in runs if run.stages), [])
    for span in shaded:
        if span.stage == "subnetwork":
            axes.axvspan(span.first - 0.5, span.last + 0.5, color="0.5", alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHING_STEPS} steps", xlim=(0.5, None))
    if shaded:
        axes.set_title("Shaded: SUBNETWORK, where DPS updates only the best-scored entries", fontsize=10)
    axes.legend(frameon=False)


def _draw_selected(axes: Axes, runs: Sequence[Run], colors: Mapping[str, str]) -> None:
    names = list(runs[0].selections[-1].fraction)[::-1]
    for run in runs:
        fractions = [run.selections[-1].fraction.get(name, np.nan) for name in names]
        axes.plot(fractions, range(len(names)), "o", color=colors[run.title], label=run.title, ms=5)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel="fraction of the layer's entries in the subnetwork")
    axes.set_title("The last subnetwork, by layer", fontsize=10)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _smooth(values: Sequence[float]) -> np.ndarray:
    width = min(SMOOTHING_STEPS, len(values))
    padded = np.pad(np.asarray(values, dtype=float), (width - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _short(name: str) -> str:
    return name.replace("base_model.", "").replace("encoder.layer.", "").replace("attention.", "att.")
