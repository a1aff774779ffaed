"""What one run of each method shows: costs, which hardly differ from seed to seed; not which one is more accurate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from peft_dps.compare.report.costs import Costs, costs_of
from peft_dps.compare.report.experiment import Experiment
from peft_dps.compare.report.formatting import mebibytes
from peft_dps.compare.report.retention import Measure, measures_of
from peft_dps.compare.report.scores import method_scores

ALIKE = 0.03
"""How much more of the reference's memory a method may take, and still be named beside the one that takes least."""


def one_seed(experiment: Experiment) -> str:
    """Say what one seed can tell, in short sentences; nothing of several seeds, or if there is no reference to them.

    Args:
        experiment: Methods on one task.
    """
    if len(experiment.seeds) > 1 or experiment.reference is None or len(experiment.methods) == 1:
        return ""
    unknown = "One seed cannot tell which method is more accurate."
    return " ".join(filter(None, [_memory(experiment), *_kept(experiment), unknown]))


def _memory(experiment: Experiment) -> str:
    """Say which methods take the least memory, and what time and file they take; and which one takes the most."""
    costs = [each for each in costs_of(experiment) if each.memory_ratio is not None]
    base = next((each for each in costs if each.method is experiment.reference), None)
    if base is None or len(costs) == 1:
        return ""
    least, most = min(map(_ratio, costs)), max(costs, key=_ratio)
    best = [each for each in costs if _ratio(each) <= least + ALIKE]
    if base in best:
        return f"No method takes less memory than {base.method.title}."
    shares = [f"{_span(best, _ratio)} of that of {base.method.title}"]
    if all(each.step_ratio is not None for each in best):
        shares.append(f"{_span(best, lambda each: each.step_ratio or 0)} of its step time")
    if base.file_size and all(each.file_size for each in best):
        sizes = " to ".join(dict.fromkeys(mebibytes(each.file_size) for each in best))
        shares.append(f"a file of {sizes} instead of {mebibytes(base.file_size)}")
    said = f"{listed(each.method.title for each in best)} take{'s' * (len(best) == 1)} the least memory: "
    said += f"{listed(shares)}."
    if _ratio(most) > 1:
        said += f" {most.method.title} takes the most memory, {_ratio(most):.2f} of it."
    return said


def _ratio(costs: Costs) -> float:
    return costs.memory_ratio or 0


def _span(costs: Sequence[Costs], value: Callable[[Costs], float]) -> str:
    values = sorted(map(value, costs))
    return " to ".join(dict.fromkeys(f"{each:.2f}" for each in (values[0], values[-1])))


def listed(parts: Iterable[str]) -> str:
    """Join names as a sentence does."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _kept(experiment: Experiment) -> list[str]:
    """Say of each probe which method leaves the most of it in this one run, and which one the least."""
    return [said for measure in measures_of(experiment) if (said := _kept_of(experiment, measure))]


def _kept_of(experiment: Experiment, measure: Measure) -> str:
    found = sorted(
        (each for each in method_scores(experiment, measure.place) if each.values), key=lambda each: each.mean
    )
    if measure.before is None or len(found) < 2:
        return ""
    before, most, least = (measure.show(value, digits=1) for value in (measure.before, found[-1].mean, found[0].mean))
    return (
        f"On {measure.title}, which no method was trained for, {found[-1].method.title} went from {before} to {most} "
        f"and {found[0].method.title} to {least}."
    )
