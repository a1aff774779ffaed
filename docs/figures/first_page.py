"""Draws docs/images/first_page.png: what methods gain, beside what they keep and the memory that they take.

Run by hand from the root of a checkout, with the extra `compare`: PYTHONPATH=. python docs/figures/first_page.py
"""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from peft_dps.compare.report.experiment import PROBE, Experiment, experiments_of
from peft_dps.compare.report.scores import MethodScores, method_scores
from peft_dps.compare.report.style import canvas, legend, save, styles_of
from peft_dps.compare.runs.results import read

DOCS = Path(__file__).parents[1]
RESULTS, IMAGE = DOCS / "results" / "first_page.jsonl", DOCS / "images" / "first_page.png"
KEPT, OURS = "stsb", "random-columns"


def draw(experiment: Experiment, image: Path) -> None:
    """Draw two panels that share the accuracy: kept against gained, and memory against gained."""
    gained = method_scores(experiment, experiment.domains[0])
    kept = {each.method.variant: each for each in method_scores(experiment, PROBE + KEPT)}
    styles = styles_of([experiment])
    before = next(each.before for run in experiment.runs for each in run.retention if each.probe == KEPT)
    with canvas(3.6, 8.2) as figure:
        left, right = figure.subplots(1, 2, sharex=True)
        for each in sorted(gained, key=lambda each: each.method.variant.startswith(OURS)):  # ours above the others
            own = kept[each.method.variant]
            memory = statistics.median(run.peak_memory for run in each.method.finished) / 2**20
            point = styles[each.method.variant].point
            _cross(left, each, 100 * own.mean, _reach(own), point)
            _cross(right, each, memory, None, point)
            left.plot([], [], linestyle="none", label=each.method.title, **point)
        left.axhline(100 * before, color="0.4", linestyle=":", linewidth=1.2, label="before training")
        left.set_ylabel("kept: similarity of sentences,\n100 x Spearman, never trained for")
        right.set_ylabel("peak memory, MiB")
        right.set_ylim(bottom=0)
        for axes, way in ((left, "up"), (right, "down")):
            axes.set_xlabel("gained: 100 x accuracy on movie reviews")
            axes.set_title(f"better is to the right and {way}; bars: 95% intervals", fontsize=9, loc="left")
        legend(figure, left, columns=4)
    save(figure, image)


def _cross(
    axes: Axes, gained: MethodScores, y: float, reach: list[list[float]] | None, point: dict[str, object]
) -> None:
    axes.errorbar(
        100 * gained.mean, y, xerr=_reach(gained), yerr=reach, elinewidth=0.8, linestyle="none", markersize=7, **point
    )


def _reach(scores: MethodScores) -> list[list[float]]:
    low, high = scores.interval or (scores.mean, scores.mean)
    return [[100 * (scores.mean - low)], [100 * (high - scores.mean)]]


if __name__ == "__main__":
    (experiment,) = experiments_of(read(RESULTS))
    draw(experiment, IMAGE)
