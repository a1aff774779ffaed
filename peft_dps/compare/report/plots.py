"""Figures of an experiment, each with its uncertainty: quality against costs, scores by seed, learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from peft_dps.compare.report.conclusion import MARGIN
from peft_dps.compare.report.costs import step_ratios
from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.scores import MethodScores, method_scores
from peft_dps.compare.report.style import LINE, Style, canvas, headline, label, legend

_LOG_FROM = 20  # largest over smallest cost, from which a linear axis would crowd the small ones

Styles = Mapping[str, Style]


def draw_costs(experiment: Experiment, styles: Styles) -> Figure:
    """Draw the score in domain against peak memory and against step time, the latter if it was measured, interleaved.

    Seconds of a run are no substitute: they tell what else the machine did.
    """
    found = [each for each in method_scores(experiment, experiment.domains[0]) if each.values]
    memory = {each.method.variant: [run.peak_memory / 2**20 for run in each.method.finished] for each in found}
    costs = {"peak memory, MiB": memory}
    if experiment.timing is not None:
        costs["step time, ratio"] = step_ratios(experiment.timing, experiment.reference_variant)
    with canvas(2.2 * len(costs)) as figure:
        panels = figure.subplots(len(costs), 1, squeeze=False)[:, 0]
        for axes, (name, values) in zip(panels, costs.items(), strict=True):
            _draw_places(axes, found, values, styles)
            for own in found:
                if own.method is experiment.reference:
                    top = 100 * own.mean
                    within = f"within {100 * MARGIN:.0f} points below\n{label(own.method.title)}"
                    axes.axhspan(top - 100 * MARGIN, top, color="0.5", alpha=0.15, linewidth=0, label=within)
            axes.set(xlabel=name, ylabel=label(f"100 x {experiment.metric}", 18))
        headline(figure, f"{experiment.name}, tested on {experiment.domains[0]}: better is up and to the left")
        legend(figure, panels[0])
    return figure


def draw_seeds(experiment: Experiment, domain: str, styles: Styles) -> Figure:
    """Draw the score of every run on a test domain, and the mean of each method with its interval."""
    found = method_scores(experiment, domain)
    names = [label(own.method.title, 22) for own in found]
    with canvas(0.6 + sum(0.15 + LINE * (1 + name.count("\n")) for name in names)) as figure:
        axes = figure.subplots()
        for row, own in enumerate(found):
            style = styles[own.method.variant]
            values = [100 * value for value in own.values]
            axes.plot(values, [row] * len(values), linestyle="none", markersize=4.5, alpha=0.9, **style.point)
            if own.interval:
                low, high = own.interval
                axes.plot([100 * low, 100 * high], [row + 0.3] * 2, color=style.color, linewidth=2)
                axes.plot(100 * own.mean, row + 0.3, marker="|", color=style.color, markersize=8, markeredgewidth=2)
            if own.failed:
                at_edge = axes.get_yaxis_transform()
                said = f"{own.failed} failed"
                axes.text(0.98, row, said, transform=at_edge, ha="right", va="center", fontsize=8, color="0.3")
        axes.set_yticks(range(len(found)), names, fontsize=8)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"100 x {experiment.metric}")
        headline(figure, f"{experiment.name}, tested on {domain}")
    return figure


def draw_curves(experiment: Experiment, styles: Styles) -> Figure | None:
    """Draw the validation score by step, or where nothing was held out the training loss, a panel for each method.

    Returns:
        The figure; None if no run has either.
    """
    validated = any(run.evaluations for each in experiment.methods for run in each.finished)
    curves = {each.variant: _curve(each, validated=validated) for each in experiment.methods}
    found = [each for each in experiment.methods if curves[each.variant] is not None]
    if not found:
        return None
    reference = curves.get(experiment.reference_variant)
    shown = [each for each in found if each is not experiment.reference] or found
    rows = math.ceil(len(shown) / 2)
    with canvas(0.5 + 1.35 * rows) as figure:
        grid = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, each in zip(grid.flat, shown, strict=False):
            for curve, style in ((reference, Style("0.45", "")), (curves[each.variant], styles[each.variant])):
                if curve is not None:
                    steps, low, mean, high = curve
                    axes.fill_between(steps, low, high, color=style.color, alpha=0.2, linewidth=0)
                    axes.plot(steps, mean, **style.curve)
            axes.set_title(label(each.title, 28), fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        figure.supxlabel("step", fontsize=9)
        figure.supylabel(f"validation: 100 x {experiment.metric}" if validated else "training loss", fontsize=9)
        beside = f"; grey: {experiment.reference_title}" if reference is not None and shown != found else ""
        headline(figure, f"{experiment.name}{beside}")
    return figure


def _draw_places(
    axes: Axes, found: Sequence[MethodScores], costs: Mapping[str, Sequence[float]], styles: Styles
) -> None:
    known = [own for own in found if costs.get(own.method.variant)]
    for own in known:
        values = costs[own.method.variant]
        low, cost, high = np.percentile(values, (25, 50, 75))
        ends = own.interval or (own.mean, own.mean)
        axes.errorbar(
            cost,
            100 * own.mean,
            xerr=[[cost - low], [high - cost]],
            yerr=[[max(0.0, 100 * (own.mean - ends[0]))], [max(0.0, 100 * (ends[1] - own.mean))]],
            elinewidth=0.8,
            linestyle="none",
            markersize=6,
            **styles[own.method.variant].point,
        )
        axes.plot([], [], linestyle="none", label=label(own.method.title), **styles[own.method.variant].point)
    middle = [float(np.median(costs[own.method.variant])) for own in known]
    if middle and 0 < _LOG_FROM * min(middle) < max(middle):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _curve(method: MethodRuns, *, validated: bool) -> np.ndarray | None:
    """Return steps, and the least, mean and highest value of the seeds after each; None if no run has any."""
    if validated:
        rows = [[(look.step, 100 * look.score) for look in run.evaluations] for run in method.finished]
    else:
        rows = [
            [(run.loss_steps * (index + 1), loss) for index, loss in enumerate(run.losses)] for run in method.finished
        ]
    rows = [row for row in rows if row]
    if not rows:
        return None
    length = min(map(len, rows))
    values = np.array([row[:length] for row in rows], dtype=float)
    scores = values[:, :, 1]
    return np.array([values[0, :, 0], scores.min(axis=0), scores.mean(axis=0), scores.max(axis=0)])
