"""Figures of what DPS selects: how much of a mask stays from cycle to cycle, and which weights it falls on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.style import OTHERS, Style, canvas, headline, label, legend

_BESIDE = 0.06  # of a cycle or layer, so that what is drawn does not hide each other

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
    with canvas(2.6) as figure:
        axes = figure.subplots()
        for place, (each, found) in enumerate(known):
            style = styles[each.variant]
            mean, low, high, chance = np.array(list(found.values())).T
            ends = np.maximum(0, [mean - low, high - mean])  # the mean of equal numbers may be off by a rounding
            beside = np.array(list(found)) + _BESIDE * (place - (len(known) - 1) / 2)
            look = {**style.point, **style.curve}
            axes.errorbar(beside, mean, yerr=ends, elinewidth=0.8, markersize=4, label=label(each.title), **look)
            axes.plot(list(found), chance, ":", color=style.color, linewidth=1.2)
        axes.plot([], [], ":", color="0.3", label="two random masks\nof the same sizes")
        axes.set(xlabel="cycle", ylabel="overlap (Jaccard index)", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        headline(figure, f"{experiment.name}: how much of a mask stays from the cycle before")
        legend(figure, axes)
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
    """Draw the fraction of each weight that is in the last subnetwork, by layer, a line for each matrix.

    Returns:
        The figure; None if no method selects more of one weight than of another.
    """
    uneven = {each.title: found for each in experiment.methods if (found := fractions(each))}
    if not uneven:
        return None
    layout = places(list(dict.fromkeys(name for found in uneven.values() for name in found)))
    layers, matrices = (list(dict.fromkeys(place[axis] for place in layout.values())) for axis in (1, 0))
    with canvas(1.9 * len(uneven)) as figure:
        panels = figure.subplots(len(uneven), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, found) in zip(panels, uneven.items(), strict=True):
            for number, matrix in enumerate(matrices):
                names = [name for name in found if layout[name][0] == matrix]
                low, mean, high = np.array([found[name] for name in names]).T if names else np.empty((3, 0))
                beside = _BESIDE * (number - (len(matrices) - 1) / 2)
                style = OTHERS[number % len(OTHERS)]
                axes.errorbar(
                    [layers.index(layout[name][1]) + beside for name in names],
                    mean,
                    yerr=np.maximum(0, [mean - low, high - mean]),
                    elinewidth=0.8,
                    markersize=4,
                    label=label(matrix),
                    **{**style.point, **style.curve},
                )
            axes.set_title(label(title, 50), fontsize=9)
            axes.set_ylabel("fraction selected")
            axes.set_ylim(bottom=0)
        every = max(1, len(layers) // 12)
        panels[-1].set_xticks(range(0, len(layers), every), layers[::every])
        panels[-1].set_xlabel("layer")
        headline(figure, f"{experiment.name}: the last subnetwork")
        legend(figure, panels[0])
    return figure


def fractions(method: MethodRuns) -> dict[str, tuple[float, float, float]]:
    """Return the fraction selected per weight, least, mean and most of the seeds; empty if it is the same for all."""
    found: dict[str, list[float]] = {}
    for run in method.finished:
        for name, share in run.fractions.items():
            found.setdefault(name, []).append(share)
    return {name: (min(shares), float(np.mean(shares)), max(shares)) for name, shares in found.items()}


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
