"""What fine-tuning kept of what the pretrained model could do, beside what it gained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from peft_dps.compare.data.probe import LOSS
from peft_dps.compare.report.experiment import OTHERS, PROBE, Experiment
from peft_dps.compare.report.formatting import NONE, p_value, points
from peft_dps.compare.report.scores import MethodScores, method_scores
from peft_dps.compare.report.significance import LEVEL
from peft_dps.compare.report.table import Table

_NAMED = 3  # methods that a sentence names; of more it tells the number


@dataclass(frozen=True)
class Measure:
    """Something that fine-tuning may keep or destroy.

    Attributes:
        place: What `MethodRuns.scores` takes for it.
        title: What tables and figures call it.
        metric: What it measures.
        before: Of the pretrained model; None where it cannot do it without training.
    """

    place: str
    title: str
    metric: str
    before: float | None = None

    def natural(self, merit: float) -> float:
        """Return a value or a difference, of which higher is better, as the metric has it."""
        return 0.0 - merit if self.metric == LOSS else merit

    def show(self, merit: float | None, *, sign: bool = False, digits: int = 2) -> str:
        """Write such a value or difference; a loss with a digit more."""
        if self.metric != LOSS:
            return points(merit, sign=sign, digits=digits)
        if merit is None or math.isnan(merit):
            return NONE
        return f"{self.natural(merit):{'+' if sign else ''}.{digits + 1}f}"

    @property
    def unit(self) -> str:
        """The metric, as values are written in it."""
        return "loss a token, lower is better" if self.metric == LOSS else f"100 x {self.metric}"


def measures_of(experiment: Experiment) -> list[Measure]:
    """Return the probes of an experiment, and its other test domains together if there are any."""
    kept = {each.probe: each for run in experiment.runs for each in run.retention}
    found = [
        Measure(PROBE + name, name, each.metric, -each.before if each.metric == LOSS else each.before)
        for name, each in kept.items()
    ]
    if found and len(experiment.domains) > 1:
        found.append(Measure(OTHERS, "other domains", experiment.metric))
    return found


def retention_table(experiment: Experiment, measure: Measure) -> Table:
    """Lay out what the methods kept of something, beside what they gained."""
    found, base = method_scores(experiment, measure.place), experiment.reference_title
    gained = {each.method.variant: each.mean for each in method_scores(experiment, experiment.domains[0])}
    columns: dict[str, Callable[[MethodScores], str]] = {
        "method": lambda each: each.method.title,
        f"gained: {experiment.domains[0]}": lambda each: points(gained[each.method.variant]),
        f"{_word(measure).lower()}: {measure.title}": lambda each: measure.show(each.mean),
        "std": lambda each: measure.show(each.deviation).lstrip("-") or NONE,
        "95% interval": lambda each: _interval(measure, each),
        "change": lambda each: measure.show(_change(measure, each), sign=True),
        f"vs {base}": lambda each: measure.show(each.difference, sign=True),
        "p": lambda each: p_value(each.p),
        "p (Holm)": lambda each: p_value(each.corrected_p),
    }
    known = [each for each in found if each.values]
    best = max((each.mean for each in known), default=math.nan)
    before = [] if measure.before is None else [f"Before training: {measure.show(measure.before)}."]
    notes = [*before, *(f"{said[0].upper()}{said[1:]}." for said in _clear(experiment, measure, found))]
    stressed = frozenset(index for index, each in enumerate(found) if measure.show(each.mean) == measure.show(best))
    title = f"{_word(measure)}: {measure.title}, {measure.unit}"
    return Table.of(title, columns, found, notes=tuple(notes), best=stressed if known else frozenset())


def _word(measure: Measure) -> str:
    """What the trained model does in other domains it could not do before, so it is nothing that was kept."""
    return "Transfer" if measure.place == OTHERS else "Kept"


def kept(experiments: Sequence[Experiment]) -> str:
    """Say of the probes of an experiment what the reference leaves of them, and which methods leave more or less.

    Of several experiments nothing is said together: their probes are as different as their tasks.
    """
    if len(experiments) > 1:
        return ""
    (experiment,) = experiments
    ways: list[str] = []
    clear: list[str] = []
    for measure in measures_of(experiment):
        found = method_scores(experiment, measure.place)
        base = next((each for each in found if each.method is experiment.reference and each.values), None)
        if measure.before is not None and base is not None:
            values = (measure.show(value, digits=1) for value in (measure.before, base.mean))
            ways.append(f"from {' to '.join(values)} on {measure.title}{' (loss)' * (measure.metric == LOSS)}")
            clear += _clear(experiment, measure, found)
    if not ways:
        return ""
    said = f"what it was not trained for goes with {experiment.reference_title} {' and '.join(ways)}"
    return "; ".join([said, *clear])


def _clear(experiment: Experiment, measure: Measure, found: Sequence[MethodScores]) -> Iterator[str]:
    """Say which methods keep more or less of something than the reference, beyond chance."""
    differing = [each for each in found if each.corrected_p is not None and each.corrected_p <= LEVEL]
    for word, sign in (("more", 1), ("less", -1)):
        those = [each for each in differing if sign * (each.difference or 0) > 0]
        those.sort(key=lambda each: abs(each.difference or 0), reverse=True)
        names = [f"{each.method.title} ({measure.show(each.difference, sign=True, digits=1)})" for each in those]
        if len(names) > _NAMED:
            yield f"beyond chance, {len(names)} methods keep {word} of {measure.title}, above all {names[0]}"
        elif names:
            yield f"beyond chance, {', '.join(names)} keep{'s' * (len(names) == 1)} {word} of {measure.title}"


def _interval(measure: Measure, scores: MethodScores) -> str:
    ends = sorted(scores.interval or (), key=measure.natural)
    return " to ".join(map(measure.show, ends)) or NONE


def _change(measure: Measure, scores: MethodScores) -> float | None:
    return scores.mean - measure.before if measure.before is not None and scores.values else None
