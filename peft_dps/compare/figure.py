"""The figure of a comparison: loss by step with DPS's stages shaded, and what DPS selected by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peft_dps.compare.methods import METHODS
from peft_dps.compare.run import Run

SMOOTHING_STEPS = 9
COLORS = ("#4c566a", "#bf5b17", "#386cb0", "#1b9e77", "#7570b3")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the figure and save it as PNG.

    Args:
        runs: The runs; those of DPS have stages and selected fractions.
        path: Where to save it.
    """
    dps = [run for run in runs if run.selected]
    figure = Figure(figsize=(11, 4 + 5 * bool(dps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + bool(dps), 1, squeeze=False, height_ratios=[1, 1.3] if dps else [1]).ravel()
    _draw_losses(axes[0], runs)
    if dps:
        _draw_selected(axes[1], dps[0])
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    for color, run in zip(COLORS, runs, strict=False):
        steps = np.arange(1, len(run.losses) + 1)
        axes.plot(steps, _smooth(run.losses), color=color, label=METHODS[run.method].title)
        for start, end in _subnetwork_spans(run.stages):
            axes.axvspan(start - 0.5, end + 0.5, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHING_STEPS} steps", xlim=(0.5, None))
    axes.set_title("Shaded: SUBNETWORK, where DPS updates only the best-scored entries", fontsize=10)
    axes.legend(frameon=False)


def _draw_selected(axes: Axes, run: Run) -> None:
    names = list(run.selected)[::-1]
    fractions = [run.selected[name] for name in names]
    axes.barh(range(len(names)), fractions, color=COLORS[1])
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=6)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel="fraction of the layer's entries in the subnetwork")
    axes.set_title(f"{METHODS[run.method].title}: the last subnetwork, by layer", fontsize=10)


def _subnetwork_spans(stages: Sequence[str]) -> Iterator[tuple[int, int]]:
    step = 1
    for stage, group in groupby(stages):
        length = len(list(group))
        if stage == "subnetwork":
            yield step, step + length - 1
        step += length


def _smooth(values: Sequence[float]) -> np.ndarray:
    width = min(SMOOTHING_STEPS, len(values))
    padded = np.pad(np.asarray(values, dtype=float), (width - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _short(name: str) -> str:
    return name.replace("base_model.", "").replace("encoder.layer.", "").replace("attention.", "att.")
