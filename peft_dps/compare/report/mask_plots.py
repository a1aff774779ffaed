"""Figures of what DPS selects: how much of a mask stays from cycle to cycle, and which weights it falls on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.plots import WIDTH
from peft_dps.compare.report.style import Style, canvas, headline, label, legend

_BESIDE = 0.06  # of a cycle, so that methods do not hide each other

Place = tuple[str, str]
"""A matrix, and its layer."""


def draw_overlap(experiment: Experiment, styles: Mapping[str, Style]) -> Figure | None:
    """Draw the overlap of masks with those of the cycle before, and what chance alone would give.

    Returns:
        The figure; None if no method has two cycles.
    """
    known = [(each, found) for each in experiment.methods if (found := overlaps(each))]
    if not known:
        return None
    with canvas(WIDTH, 3.6) as figure:
        axes = figure.subplots()
        for place, (each, found) in enumerate(known):
            style = styles[each.variant]
            mean, low, high, chance = np.array(list(found.values())).T
            ends = np.maximum(0, [mean - low, high - mean])  # the mean of equal numbers may be off by a rounding
            beside = np.array(list(found)) + _BESIDE * (place - (len(known) - 1) / 2)
            look = {**style.point, **style.curve}
            axes.errorbar(beside, mean, yerr=ends, elinewidth=1, markersize=6, label=label(each.title), **look)
            axes.plot(list(found), chance, ":", color=style.color, linewidth=1.2)
        axes.plot([], [], ":", color="0.3", label="two random masks\nof the same sizes")
        axes.plot([], [], "|", color="0.3", markersize=12, label="from the least to the\nmost overlapping weight")
        axes.set(xlabel="cycle", ylabel="overlap with the cycle before\n(Jaccard index)", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        headline(figure, f"{experiment.name}: how much of a mask stays, mean over weights and seeds")
        legend(figure, axes, [each for each, _ in known])
    return figure


def overlaps(method: MethodRuns) -> dict[int, np.ndarray]:
    """Return per cycle the overlap, its least and most, and that of random masks, as means over the seeds."""
    found: dict[int, list[list[float]]] = {}
    for run in method.finished:
        for selection in run.selections:
            if selection.chance is not None:
                found.setdefault(selection.cycle, []).append([*selection.overlap, selection.chance])
    return {cycle: np.mean(found[cycle], axis=0) for cycle in sorted(found)}


def draw_selection(experiment: Experiment) -> Figure | None:
    """Draw the fraction of each weight that is in the last subnetwork, by matrix and layer.

    Returns:
        The figure; None if no method selects more of one weight than of another.
    """
    uneven = {each.title: found for each in experiment.methods if (found := fractions(each))}
    if not uneven:
        return None
    layout = places(list(dict.fromkeys(name for found in uneven.values() for name in found)))
    layers, matrices = (list(dict.fromkeys(place[axis] for place in layout.values())) for axis in (1, 0))
    most = max(max(found.values()) for found in uneven.values())
    with canvas(max(WIDTH, 2.5 + 3.2 * len(uneven)), 1.8 + 0.25 * len(layers)) as figure:
        panels = figure.subplots(1, len(uneven), sharey=True, squeeze=False)[0]
        for axes, (title, found) in zip(panels, uneven.items(), strict=True):
            values = np.full((len(layers), len(matrices)), np.nan)
            for name, share in found.items():
                matrix, layer = layout[name]
                values[layers.index(layer), matrices.index(matrix)] = share
            axes.imshow(values, cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(label(title))
            axes.set_xticks(range(len(matrices)), matrices, rotation=90, fontsize=7)
        panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
        panels[0].set_ylabel("layer")
        figure.colorbar(panels[0].images[0], ax=panels, label="fraction selected", fraction=0.03, pad=0.01)
        headline(figure, f"{experiment.name}: fraction of each weight's entries in the last subnetwork")
    return figure


def fractions(method: MethodRuns) -> dict[str, float]:
    """Return the fraction selected per weight, as a mean over the seeds; empty if it is the same for all weights."""
    found: dict[str, list[float]] = {}
    for run in method.finished:
        for name, share in run.fractions.items():
            found.setdefault(name, []).append(share)
    return {name: float(np.mean(shares)) for name, shares in found.items()}


def places(names: Sequence[str]) -> dict[str, Place]:
    """Say where in the model weights are.

    Returns:
        Per path the matrix and the number of its layer, the first number of the path. Of a path without a number the
        matrix is the last part of what is left, and the layer "-".
    """
    found = {}
    for name in names:
        parts = name.split(".")
        first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        inside = parts[-2:] if first is None else parts[first + 1 :] or parts
        found[name] = ".".join(inside), "-" if first is None else parts[first]
    return found
