"""What experiments show, in one sentence made from their statistics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from peft_dps.compare.report.costs import Costs, costs_of
from peft_dps.compare.report.experiment import Experiment, without_dropout
from peft_dps.compare.report.formatting import points
from peft_dps.compare.report.one_seed import ALIKE, listed, one_seed
from peft_dps.compare.report.retention import kept
from peft_dps.compare.report.scores import MethodScores, OverallScores, overall_scores
from peft_dps.compare.report.significance import LEVEL, least_p, pairs_needed

MARGIN = 0.02
"""How far below the reference a method may score and still count as good enough."""

Finding = Callable[[Sequence[Experiment]], str]
"""Returns what experiments show as a clause of a sentence; empty if they show nothing of the kind."""


def conclusion(experiments: Sequence[Experiment]) -> str:
    """Sum experiments up in one sentence: a clause for each of `FINDINGS`, of one seed that of `one_seed`."""
    if len(experiments) == 1 and (said := one_seed(experiments[0])):
        return said
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
    if clear := _clear(found):
        names = ", ".join(f"{each.method.title} ({points(each.difference, sign=True, digits=1)})" for each in clear)
        return f"beyond chance, {names} differ{'s' if len(clear) == 1 else ''} from {base}"
    pairs, needed = max(each.pairs for each in tested), pairs_needed(len(tested))
    said = f"no method differs from {base} beyond chance"
    if least_p(pairs) * len(tested) > LEVEL:
        said += f", which {pairs} pairs of runs could not show: it takes {needed}"
    return said


def like_for_like(experiments: Sequence[Experiment]) -> str:
    """Say whether what was trained without dropout also differs from the reference without it."""
    alike = [found for found in map(without_dropout, experiments) if found is not None]
    variants = {each.variant for experiment in alike for each in experiment.methods}
    if not any(each.method.variant in variants for each in _clear(overall_scores(experiments))):
        return ""
    return f"of those without dropout, {clear_differences(overall_scores(alike), _reference_title(alike))}"


def cheapest(experiments: Sequence[Experiment]) -> str:
    """Say which method with a mean close to that of the reference, or above it, takes the least memory."""
    costs: dict[str, list[Costs]] = {}
    for each in (each for experiment in experiments for each in costs_of(experiment)):
        if each.memory_ratio is not None:
            costs.setdefault(each.method.variant, []).append(each)
    known = [(each.method, each.difference) for each in overall_scores(experiments) if each.difference is not None]
    near = [method for method, difference in known if difference >= -MARGIN and method.variant in costs]
    within = f"within {points(MARGIN, digits=0)} points"
    if not costs or not known:
        return ""
    if not near:
        return f"none comes {within} of it"
    memory = {
        method.variant: statistics.fmean(each.memory_ratio or 0 for each in costs[method.variant]) for method in near
    }
    least = min(memory[method.variant] for method in near)
    if least >= 1:
        return f"none {within} of {_reference_title(experiments)} takes less memory"
    best = [method for method in near if memory[method.variant] <= least + ALIKE]
    shares = []
    for method in best:
        steps = [each.step_ratio for each in costs[method.variant] if each.step_ratio is not None]
        and_time = f", {statistics.fmean(steps):.2f} of the step time" if steps else ""
        shares.append(f"{method.title} ({memory[method.variant]:.2f} of the memory{and_time})")
    return f"the cheapest in memory {within} {'is' if len(best) == 1 else 'are'} {listed(shares)}"


FINDINGS: tuple[Finding, ...] = (difference, like_for_like, kept, cheapest)


def _clear(found: Sequence[MethodScores | OverallScores]) -> list[MethodScores | OverallScores]:
    return [each for each in found if each.corrected_p is not None and each.corrected_p <= LEVEL]


def _reference_title(experiments: Sequence[Experiment]) -> str:
    return next((each for each in experiments if each.reference), experiments[0]).reference_title
