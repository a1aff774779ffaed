"""Figures of what DPS selects: over layers, matrices and cycles, and how much of it stays from cycle to cycle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_dps.compare.contest import Contender, Contest
from peft_dps.compare.palette import Style, canvas, headline, label, legend
from peft_dps.compare.plots import WIDTH
from peft_dps.compare.run import Selection

OTHER = "other"
_PREFIX = "base_model.model."  # what PEFT puts before the path in the model
_BESIDE = 0.06  # of a cycle, so that methods do not hide each other
_FLAT = 0.005  # shares that differ by less are equal up to rounding

Values = Callable[[Selection], Mapping[str, float]]
Place = tuple[str, int | str]
"""A matrix, and its layer."""


@dataclass(frozen=True)
class Grid:
    """Numbers by weight and cycle, as means over the seeds.

    Attributes:
        names: Paths of the weights.
        cycles: Numbers of the cycles.
        values: Array `[weights, cycles]`, NaN where there is none.
    """

    names: tuple[str, ...]
    cycles: tuple[int, ...]
    values: np.ndarray


def draw_selection(contest: Contest) -> Figure | None:
    """Draw the fraction of each weight that DPS selects, over the cycles.

    Args:
        contest: The contest.

    Returns:
        The figure; None if no method selects more of one weight than of another.
    """
    uneven = [(each, grid) for each, grid in _grids(contest, fraction) if not is_flat(grid)]
    title = f"{contest.name}: fraction of each weight's entries in the subnetwork"
    return _draw_maps(uneven, title, "fraction selected") if uneven else None


def draw_overlap_by_layer(contest: Contest) -> Figure | None:
    """Draw the overlap of each weight's mask with that of the cycle before.

    Args:
        contest: The contest.

    Returns:
        The figure; None if no method has two cycles.
    """
    known = _grids(contest, overlap)
    title = f"{contest.name}: overlap of masks with those of the cycle before"
    return _draw_maps(known, title, "overlap (Jaccard index)") if known else None


def draw_overlap(contest: Contest, styles: Mapping[str, Style]) -> Figure | None:
    """Draw the overlap of masks with those of the cycle before, and what chance alone would give.

    Args:
        contest: The contest.
        styles: Per variant, how it looks.

    Returns:
        The figure; None if no method has two cycles.
    """
    known = _grids(contest, overlap)
    if not known:
        return None
    with canvas(WIDTH, 3.6) as figure:
        axes = figure.subplots()
        for place, (each, grid) in enumerate(known):
            style = styles[each.variant]
            mean = np.nanmean(grid.values, axis=0)
            low, high = np.nanmin(grid.values, axis=0), np.nanmax(grid.values, axis=0)
            ends = np.maximum(0, [mean - low, high - mean])  # the mean of equal numbers may be off by a rounding
            beside = np.asarray(grid.cycles) + _BESIDE * (place - (len(known) - 1) / 2)
            look = {**style.point, **style.curve}
            axes.errorbar(beside, mean, yerr=ends, elinewidth=1, markersize=6, label=label(each.title), **look)
            expected = chance(each)
            axes.plot(list(expected), list(expected.values()), ":", color=style.color, linewidth=1.2)
        axes.plot([], [], ":", color="0.3", label="two random masks\nof the same sizes")
        axes.plot([], [], "|", color="0.3", markersize=12, label="from the least to the\nmost overlapping weight")
        axes.set(xlabel="cycle", ylabel="overlap with the cycle before\n(Jaccard index)", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        headline(figure, f"{contest.name}: how much of a mask stays, mean over weights and seeds")
        legend(figure, axes, [each for each, _ in known])
    return figure


def fraction(selection: Selection) -> Mapping[str, float]:
    """Return the selected fraction per weight."""
    return selection.fraction


def overlap(selection: Selection) -> Mapping[str, float]:
    """Return the overlap with the cycle before, per weight."""
    return selection.overlap


def grid_of(contender: Contender, values: Values) -> Grid | None:
    """Average numbers of selections over the seeds.

    Args:
        contender: The method.
        values: Which numbers.

    Returns:
        The grid; None if there are none.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for run in contender.finished:
        for selection in run.selections:
            for name, value in values(selection).items():
                found.setdefault((name, selection.cycle), []).append(value)
    if not found:
        return None
    names = tuple(dict.fromkeys(name for name, _ in found))
    cycles = tuple(sorted({cycle for _, cycle in found}))
    means = [[np.mean(found.get((name, cycle), [np.nan])) for cycle in cycles] for name in names]
    return Grid(names, cycles, np.asarray(means, dtype=float))


def _grids(contest: Contest, values: Values) -> list[tuple[Contender, Grid]]:
    return [(each, grid) for each in contest.contenders if (grid := grid_of(each, values)) is not None]


def is_flat(grid: Grid) -> bool:
    """Whether all weights have the same share, as with `scope="tensor"`."""
    return bool(np.nanmax(grid.values) - np.nanmin(grid.values) < _FLAT)


def chance(contender: Contender) -> dict[int, float]:
    """Return per cycle the overlap that independent random masks of the same sizes have on average.

    Of two masks that hold the fractions a and b of a large weight, ab lie in both and a + b - ab in one or both.

    Args:
        contender: The method.
    """
    grid = grid_of(contender, fraction)
    if grid is None:
        return {}
    expected = {}
    for (index, _), (later, cycle) in pairwise(enumerate(grid.cycles)):
        a, b = grid.values[:, index], grid.values[:, later]
        either = a + b - a * b
        expected[cycle] = float(np.nanmean(np.divide(a * b, either, out=np.ones_like(a), where=either > 0)))
    return expected


def places(names: Sequence[str]) -> dict[str, Place]:
    """Say where in the model weights are.

    Args:
        names: Paths of weights.

    Returns:
        Per path the matrix, shortened as far as all matrices stay distinct, and the number of its layer: the first
        number of the path. A path without a number is in the matrix "other", with its last part for a layer.
    """
    split: dict[str, tuple[tuple[str, ...], int]] = {}
    for name in names:
        parts = name.split(".")
        first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if first is not None and first + 1 < len(parts):
            split[name] = tuple("*" if part.isdigit() else part for part in parts[first + 1 :]), int(parts[first])
    short = _shorten({matrix for matrix, _ in split.values()})
    outside = {name: tuple(name.removeprefix(_PREFIX).split(".")) for name in names if name not in split}
    others = _shorten(set(outside.values()), least=2)
    return {
        name: (short[split[name][0]], split[name][1]) if name in split else (OTHER, others[outside[name]])
        for name in names
    }


def _shorten(paths: set[tuple[str, ...]], least: int = 1) -> dict[tuple[str, ...], str]:
    def shortest(path: tuple[str, ...]) -> str:
        for length in range(least, len(path)):
            if sum(other[-length:] == path[-length:] for other in paths) == 1:
                return ".".join(path[-length:])
        return ".".join(path)

    return {path: shortest(path) for path in paths}


def _draw_maps(grids: Sequence[tuple[Contender, Grid]], title: str, quantity: str) -> Figure:
    layout = places(list(dict.fromkeys(name for _, grid in grids for name in grid.names)))
    matrices = list(dict.fromkeys(matrix for matrix, _ in layout.values()))
    matrices.sort(key=OTHER.__eq__)  # the order of the model, weights outside its layers last
    rows = {
        matrix: sorted({layer for own, layer in layout.values() if own == matrix}, key=_order) for matrix in matrices
    }
    limits = min(np.nanmin(grid.values) for _, grid in grids), max(np.nanmax(grid.values) for _, grid in grids)
    tallest = min(4.0, 0.55 + 0.17 * max(map(len, rows.values())))
    with canvas(max(WIDTH, 2.2 + 1.15 * len(matrices)), 1.1 + len(grids) * tallest) as figure:
        panels = figure.subplots(len(grids), len(matrices), squeeze=False)
        for (each, grid), line in zip(grids, panels, strict=True):
            for axes, matrix in zip(line, matrices, strict=True):
                _draw_map(axes, grid, layout, matrix, rows[matrix], limits)
            line[0].set_ylabel(f"{label(each.title, 20)}\nlayer")
            for axes, matrix in zip(line[1:], matrices[1:], strict=True):
                if matrix != OTHER and rows[matrix] == rows[matrices[0]]:
                    axes.set_yticklabels([])
        for axes, matrix in zip(panels[0], matrices, strict=True):
            axes.set_title(matrix.replace(".", ".\n"), fontsize=8)
        for axes in panels[:-1].flat:
            axes.set_xticklabels([])
        figure.colorbar(panels[0, 0].images[0], ax=panels, label=quantity, fraction=0.03, pad=0.01)
        figure.supxlabel("cycle", fontsize=9)
        headline(figure, title)
    return figure


def _draw_map(
    axes: Axes,
    grid: Grid,
    layout: Mapping[str, Place],
    matrix: str,
    layers: Sequence[int | str],
    limits: tuple[float, float],
) -> None:
    values = np.full((len(layers), len(grid.cycles)), np.nan)
    for row, layer in enumerate(layers):
        # Several weights share a place if the path has further numbers, as those of experts.
        found = [grid.values[index] for index, name in enumerate(grid.names) if layout[name] == (matrix, layer)]
        if found:
            values[row] = np.mean(found, axis=0)
    axes.imshow(
        values,
        cmap="cividis",
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
        extent=(grid.cycles[0] - 0.5, grid.cycles[-1] + 0.5, len(layers) - 0.5, -0.5),
    )
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    step = 1 if matrix == OTHER else -(-len(layers) // 8)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    if matrix == OTHER:
        axes.yaxis.tick_right()
        axes.spines[["left", "right"]].set_visible(False)


def _order(layer: int | str) -> tuple[bool, int, str]:
    return isinstance(layer, str), layer if isinstance(layer, int) else 0, str(layer)
