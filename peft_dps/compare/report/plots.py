"""Figures of an experiment: quality against costs, scores by seed, learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from peft_dps.compare.report.costs import costs_of, reference_ends
from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.scores import MethodScores, method_scores
from peft_dps.compare.report.style import Style, canvas, headline, label, legend

WIDTH = 10.0
_SMOOTHED = 9, 1 / 12  # steps, and fraction of all steps: whichever is less
_COLUMNS = 3
_LOG_FROM = 20  # largest over smallest cost, from which a linear axis would crowd the small ones

Styles = Mapping[str, Style]


def draw_costs(experiment: Experiment, styles: Styles) -> Figure:
    """Draw the score in domain against peak memory and against step time, with the Pareto fronts.

    Step time is there if that of all methods was measured, interleaved. Seconds of a run are no substitute: they tell
    what else the machine did.
    """
    found = method_scores(experiment, experiment.domains[0])
    places = [(costs, own) for costs, own in zip(costs_of(experiment), found, strict=True) if own.values]
    with canvas(WIDTH, 4.2) as figure:
        ratios = [(costs.step_ratio, own) for costs, own in places if costs.step_ratio is not None]
        panels = figure.subplots(1, 2 if len(ratios) == len(places) else 1, sharey=True, squeeze=False)[0]
        left = panels[0]
        _draw_front(left, [((costs.peak_memory or 0) / 2**20, own) for costs, own in places], styles)
        left.set(xlabel="peak memory, MiB", ylabel=f"{experiment.domains[0]}: 100 x {experiment.metric}")
        for right in panels[1:]:
            _draw_front(right, ratios, styles)
            right.set(xlabel="step time, ratio")
        headline(figure, f"{experiment.name}: better is up and to the left")
        legend(figure, left, experiment.methods)
    return figure


def draw_seeds(experiment: Experiment, styles: Styles) -> Figure:
    """Draw the score of every run, one panel per test domain; lines join runs of one seed."""
    columns = min(_COLUMNS, len(experiment.domains)) if len(experiment.domains) != 4 else 2
    rows = math.ceil(len(experiment.domains) / columns)
    count = len(experiment.methods)
    with canvas(WIDTH, rows * (1.1 + 0.3 * count)) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(experiment.domains) :]:
            axes.set_visible(False)
        for axes, domain in zip(grid.flat, experiment.domains, strict=False):
            _draw_strip(axes, experiment, domain, styles)
        grid[0, 0].set_yticks(range(count), [label(each.title, 34) for each in experiment.methods])
        grid[0, 0].set_ylim(count - 0.4, -0.6)
        headline(figure, f"{experiment.name}: every run a point; bars: mean and its 95% interval; lines: one seed")
    return figure


def draw_curves(experiment: Experiment, styles: Styles) -> Figure | None:
    """Draw training loss and validation score by step, as means over the seeds, with the stages of DPS shaded.

    Returns:
        The figure; None if no run has losses or evaluations.
    """
    found = [each for each in experiment.methods if any(run.losses or run.evaluations for run in each.finished)]
    if not found:
        return None
    window = max(1, round(min(_SMOOTHED[0], _SMOOTHED[1] * _last_step(found))))
    with canvas(WIDTH, 6.4) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True)
        staged = next((each for each in found if any(run.selections for run in each.finished)), None)
        if staged is not None:
            for selection in next(run.selections for run in staged.finished if run.selections):
                for axes in (top, bottom):
                    first, last = selection.first - 0.5, selection.last + 0.5
                    axes.axvspan(first, last, color="0.5", alpha=0.13, linewidth=0)
        for each in found:
            style = styles[each.variant]
            if losses := [run.losses for run in each.finished if run.losses]:
                every = max(run.loss_steps for run in each.finished)
                mean = _mean(losses)
                smooth = _smooth(mean, max(1, round(window / every)))
                top.plot(every * np.arange(1, len(mean) + 1), smooth, **style.curve)
            if looks := [run.evaluations for run in each.finished if run.evaluations]:
                steps = [look.step for look in min(looks, key=len)]
                scores = _mean([[100 * look.score for look in run] for run in looks])
                bottom.plot(steps, scores, markersize=4, **{**style.point, **style.curve})
            bottom.plot([], [], label=label(each.title), markersize=4, **{**style.point, **style.curve})
        if ends := reference_ends(experiment):
            bottom.axhline(
                100 * float(np.mean(list(ends.values()))),
                color="0.4",
                linestyle=":",
                linewidth=1.2,
                label=f"{experiment.reference_title} at its end",
            )
        top.set(ylabel="training loss" + (f", mean of {window} steps" if window > 1 else ""))
        top.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom.set(xlabel="step", ylabel=f"validation: 100 x {experiment.metric}", xlim=(0.5, _last_step(found) + 0.5))
        _from_percentile(bottom)
        shaded = "" if staged is None else f"; shaded: SUBNETWORK of {staged.title}"
        headline(figure, f"{experiment.name}: means over seeds{shaded}")
        legend(figure, bottom, found)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats in both cost (less) and score (more), by cost.

    Args:
        points: Cost and score.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _draw_front(axes: Axes, places: Sequence[tuple[float, MethodScores]], styles: Styles) -> None:
    points = [(cost, 100 * own.mean) for cost, own in places]
    for (cost, score), (_, own) in zip(points, places, strict=True):
        ends = own.interval or (own.mean, own.mean)
        bars = [[max(0.0, score - 100 * ends[0])], [max(0.0, 100 * ends[1] - score)]]
        point = styles[own.method.variant].point
        axes.errorbar(cost, score, yerr=bars, elinewidth=0.8, linestyle="none", markersize=7, **point)
        axes.plot([], [], linestyle="none", markersize=7, label=label(own.method.title), **point)
    front = [points[index] for index in pareto(points)]
    if front:
        front.append((max(cost for cost, _ in points), front[-1][1]))  # whoever costs more has to be better
        costs, scores = zip(*front, strict=True)
        axes.step(costs, scores, where="post", color="0.6", linewidth=1.5, zorder=1, label="Pareto front")
    known = [cost for cost, _ in points if cost > 0]
    if known and max(known) > _LOG_FROM * min(known):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _draw_strip(axes: Axes, experiment: Experiment, domain: str, styles: Styles) -> None:
    found = method_scores(experiment, domain)
    for seed in experiment.seeds:
        scores = [100 * own.scores.get(seed, math.nan) for own in found]
        axes.plot(scores, range(len(found)), color="0.85", linewidth=0.8, zorder=1)
    for row, own in enumerate(found):
        style = styles[own.method.variant]
        values = [100 * value for value in own.values]
        axes.plot(values, [row] * len(values), linestyle="none", markersize=5, zorder=3, alpha=0.9, **style.point)
        if own.interval:
            low, high = own.interval
            axes.plot([100 * low, 100 * high], [row + 0.28] * 2, color=style.color, linewidth=2, zorder=2)
            axes.plot(100 * own.mean, row + 0.28, marker="|", color=style.color, markersize=9, markeredgewidth=2)
        if own.failed:
            note = f"{own.failed} failed"
            axes.annotate(
                note, (0.98, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8, color="0.3"
            )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    place = f"{domain} (in domain)" if domain == experiment.domains[0] and len(experiment.domains) > 1 else domain
    axes.set_title(label(place, 34))
    axes.set_xlabel(f"100 x {experiment.metric}")


def _last_step(methods: Sequence[MethodRuns]) -> int:
    runs = [run for each in methods for run in each.finished]
    return max(max(run.loss_steps * len(run.losses), *(look.step for look in run.evaluations), 1) for run in runs)


def _mean(rows: Sequence[Sequence[float]]) -> np.ndarray:
    length = min(map(len, rows))
    mean: np.ndarray = np.mean([row[:length] for row in rows], axis=0)
    return mean


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    width = min(window, len(values))
    padded = np.pad(values, (width - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _from_percentile(axes: Axes) -> None:
    """Leave out of sight the start of training, which would press all else together."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = np.percentile(values, 10), values.max()
        axes.set_ylim(low - 0.08 * (high - low) - 0.1, high + 0.08 * (high - low) + 0.1)
