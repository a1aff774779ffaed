"""How each method stands in an experiment, and over all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.significance import holm, mean_interval, ranks, sign_flip_p


@dataclass(frozen=True)
class MethodScores:
    """How a method stands on one test domain of an experiment.

    Attributes:
        method: The method.
        scores: Per seed, its score; NaN for a failed run.
        missing: Seeds that others ran with and it did not.
        difference: Mean over the pairs of its score minus that of the reference; None without pairs.
        pairs: Seeds in which both it and the reference have a score.
        p: Of the paired permutation test against the reference; None without pairs.
        corrected_p: The same after Holm's correction over the methods of the table.
        rank: Mean over its seeds of its rank among the methods that ran with the seed, failed runs last.
    """

    method: MethodRuns
    scores: Mapping[int, float]
    missing: tuple[int, ...]
    difference: float | None
    pairs: int
    p: float | None
    corrected_p: float | None
    rank: float

    @property
    def values(self) -> list[float]:
        """The scores that are numbers, by seed."""
        return [score for score in self.scores.values() if not math.isnan(score)]

    @property
    def failed(self) -> int:
        """Number of runs without a score."""
        return len(self.scores) - len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN without scores."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds, with n - 1 in the denominator; None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bootstrap interval of the mean."""
        return mean_interval(self.values)


@dataclass(frozen=True)
class OverallScores:
    """How a method stands over all experiments, each on the domain it was trained on.

    Attributes:
        method: The method; its runs are those of its first experiment.
        experiments: Number of experiments it took part in.
        rank: Mean over these experiments of its rank.
        difference: Mean over the experiments of its mean difference to the reference; None without pairs.
        better: Experiments in which its mean difference is positive.
        pairs: Pairs with the reference over all experiments.
        p: Of the paired permutation test over all pairs, in which experiments weigh alike.
        corrected_p: The same after Holm's correction over the methods.
        finished: Runs with a score.
        failed: Runs without one.
    """

    method: MethodRuns
    experiments: int
    rank: float
    difference: float | None
    better: int
    pairs: int
    p: float | None
    corrected_p: float | None
    finished: int
    failed: int


def method_scores(experiment: Experiment, domain: str) -> list[MethodScores]:
    """Work out how each method of an experiment stands on one test domain."""
    scores = {each.variant: each.scores(domain) for each in experiment.methods}
    by_seed: dict[str, list[float]] = {variant: [] for variant in scores}
    for seed in experiment.seeds:
        present = [variant for variant in scores if seed in scores[variant]]
        for variant, rank in zip(present, ranks([scores[variant][seed] for variant in present]), strict=True):
            by_seed[variant].append(rank)
    found = []
    for each in experiment.methods:
        pairs = differences(experiment, each, domain)
        found.append(
            MethodScores(
                method=each,
                scores=scores[each.variant],
                missing=tuple(seed for seed in experiment.seeds if seed not in each.runs),
                difference=statistics.fmean(pairs) if pairs else None,
                pairs=len(pairs),
                p=sign_flip_p(pairs),
                corrected_p=None,
                rank=statistics.fmean(by_seed[each.variant]),
            )
        )
    corrected = holm([each.p for each in found])
    return [replace(each, corrected_p=p) for each, p in zip(found, corrected, strict=True)]


def differences(experiment: Experiment, method: MethodRuns, domain: str) -> list[float]:
    """Return the paired differences to the reference, by seed; none for the reference itself, or without one."""
    if experiment.reference is None or experiment.reference is method:
        return []
    own, others = method.scores(domain), experiment.reference.scores(domain)
    paired = (own[seed] - others[seed] for seed in own if seed in others)
    return [difference for difference in paired if not math.isnan(difference)]


def overall_scores(experiments: Sequence[Experiment]) -> list[OverallScores]:
    """Work out how each method stands over all experiments.

    Args:
        experiments: The experiments; those without any score are left out.
    """
    entered: dict[str, list[tuple[Experiment, MethodScores]]] = {}
    for experiment in experiments:
        for scores in method_scores(experiment, experiment.domains[0]) if experiment.domains else []:
            entered.setdefault(scores.method.variant, []).append((experiment, scores))
    found = []
    for places in entered.values():
        # An experiment with few pairs weighs as much as one with many.
        paired = [differences(experiment, own.method, experiment.domains[0]) for experiment, own in places]
        means = [statistics.fmean(pairs) for pairs in paired if pairs]
        weighted = [difference / len(pairs) for pairs in paired for difference in pairs]
        own = [scores for _, scores in places]
        found.append(
            OverallScores(
                method=own[0].method,
                experiments=len(places),
                rank=statistics.fmean(scores.rank for scores in own),
                difference=statistics.fmean(means) if means else None,
                better=sum(mean > 0 for mean in means),
                pairs=len(weighted),
                p=sign_flip_p(weighted),
                corrected_p=None,
                finished=sum(len(scores.values) for scores in own),
                failed=sum(scores.failed for scores in own),
            )
        )
    corrected = holm([each.p for each in found])
    return [replace(each, corrected_p=p) for each, p in zip(found, corrected, strict=True)]
