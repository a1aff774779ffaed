"""What experiments show, in one sentence made from their statistics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from peft_dps.compare.report.costs import costs_of
from peft_dps.compare.report.experiment import Experiment
from peft_dps.compare.report.formatting import points
from peft_dps.compare.report.scores import MethodScores, OverallScores, overall_scores
from peft_dps.compare.report.significance import LEVEL, least_p, pairs_needed

MARGIN = 0.02
"""How far below the reference a method may score and still count as good enough."""

Finding = Callable[[Sequence[Experiment]], str]
"""Returns what experiments show as a clause of a sentence; empty if they show nothing of the kind."""


def conclusion(experiments: Sequence[Experiment]) -> str:
    """Sum experiments up in one sentence, of a clause for each of `FINDINGS`."""
    clauses = [clause for finding in FINDINGS if (clause := finding(experiments))]
    if len(experiments) > 1:
        clauses[0] = f"over {len(experiments)} tasks, {clauses[0]}"
    elif len(experiments[0].domains) > 1:
        clauses[0] = f"on {experiments[0].domains[0]}, {clauses[0]}"
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def difference(experiments: Sequence[Experiment]) -> str:
    """Say which methods differ from the reference beyond chance, where they were trained."""
    return clear_differences(overall_scores(experiments), _reference_title(experiments))


def clear_differences(found: Sequence[MethodScores | OverallScores], base: str) -> str:
    """Say which methods differ from the reference beyond chance.

    Args:
        found: How the methods stand.
        base: Title of the reference.
    """
    tested = [each for each in found if each.corrected_p is not None]
    if not tested:
        compared = any(each.difference is not None for each in found)
        return f"one seed cannot tell a method from {base}" if compared else f"nothing was compared with {base}"
    if clear := [each for each in tested if each.corrected_p is not None and each.corrected_p <= LEVEL]:
        names = ", ".join(f"{each.method.title} ({points(each.difference, sign=True, digits=1)})" for each in clear)
        return f"beyond chance, {names} differ{'s' if len(clear) == 1 else ''} from {base}"
    pairs, needed = max(each.pairs for each in tested), pairs_needed(len(tested))
    said = f"no method differs from {base} beyond chance"
    if least_p(pairs) * len(tested) > LEVEL:
        said += f", which {pairs} pairs of runs could not show (it takes {needed})"
    return said


def cheapest(experiments: Sequence[Experiment]) -> str:
    """Say which method with a mean close to that of the reference, or above it, takes the least memory."""
    base = _reference_title(experiments)
    ratios: dict[str, list[tuple[float, float | None]]] = {}
    for experiment in experiments:
        costs = {each.method.variant: each for each in costs_of(experiment)}
        reference = costs.get(experiment.reference_variant)
        if reference is not None and reference.peak_memory:
            for variant, each in costs.items():
                if each.peak_memory:
                    found = each.peak_memory / reference.peak_memory, each.step_ratio
                    ratios.setdefault(variant, []).append(found)
    near = [each for each in overall_scores(experiments) if each.difference is not None]
    known = [each for each in near if each.method.variant in ratios]
    near = [each for each in known if each.difference is not None and each.difference >= -MARGIN]
    if not known:
        return ""
    if not near:
        return f"none comes within {points(MARGIN, digits=0)} points of it"
    memory = {each.method.variant: statistics.fmean(m for m, _ in ratios[each.method.variant]) for each in near}
    best = min(near, key=lambda each: memory[each.method.variant])
    if memory[best.method.variant] >= 1:
        return f"none within {points(MARGIN, digits=0)} points of {base} takes less memory"
    said = f"the cheapest within {points(MARGIN, digits=0)} points is {best.method.title}, with "
    said += f"{memory[best.method.variant]:.2f} times the memory"
    steps = [step for _, step in ratios[best.method.variant] if step is not None]
    return said + (f" and {statistics.fmean(steps):.2f} times the step time" if steps else "")


FINDINGS: tuple[Finding, ...] = (difference, cheapest)


def _reference_title(experiments: Sequence[Experiment]) -> str:
    return next((each for each in experiments if each.reference), experiments[0]).reference_title
