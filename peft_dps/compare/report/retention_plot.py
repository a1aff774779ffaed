"""The figure of what fine-tuning kept against what it gained."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_dps.compare.data.probe import LOSS
from peft_dps.compare.report.experiment import Experiment
from peft_dps.compare.report.plots import Styles
from peft_dps.compare.report.retention import Measure
from peft_dps.compare.report.scores import MethodScores, method_scores
from peft_dps.compare.report.style import canvas, headline, label, legend


def draw_retention(experiment: Experiment, measure: Measure, styles: Styles) -> Figure:
    """Draw what was kept of something against the score in domain, both with their intervals."""
    gained = {each.method.variant: each for each in method_scores(experiment, experiment.domains[0])}
    scale = -1 if measure.metric == LOSS else 100
    with canvas(3.2) as figure:
        axes = figure.subplots()
        for kept in method_scores(experiment, measure.place):
            gain = gained[kept.method.variant]
            if kept.values and gain.values:
                x, y, point = 100 * gain.mean, scale * kept.mean, styles[kept.method.variant].point
                across, along = _bars(gain, 100), _bars(kept, scale)
                axes.errorbar(x, y, xerr=across, yerr=along, elinewidth=0.8, linestyle="none", markersize=6, **point)
                axes.plot([], [], linestyle="none", markersize=6, label=label(kept.method.title), **point)
        if measure.before is not None:
            axes.axhline(scale * measure.before, color="0.4", linestyle=":", linewidth=1.2, label="before training")
        if measure.metric == LOSS:
            axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel=f"gained: {experiment.domains[0]}, 100 x {experiment.metric}")
        axes.set(ylabel=f"kept: {measure.title}\n{measure.unit}")
        headline(figure, f"{experiment.name}: better is up and to the right")
        legend(figure, axes)
    return figure


def _bars(scores: MethodScores, scale: float) -> list[list[float]]:
    """Return how far the interval reaches below and above the mean, as it is drawn."""
    ends = scores.interval or (scores.mean, scores.mean)
    low, high = sorted(scale * end for end in ends)
    return [[max(0.0, scale * scores.mean - low)], [max(0.0, high - scale * scores.mean)]]
