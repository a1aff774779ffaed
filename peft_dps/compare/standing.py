"""How each method stands in a contest, and over all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peft_dps.compare.contest import Contender, Contest
from peft_dps.compare.significance import holm, mean_interval, ranks, sign_flip_p


@dataclass(frozen=True)
class Standing:
    """How a method stands on one test domain of a contest.

    Attributes:
        contender: The method.
        scores: Per seed, its score; NaN for a failed run.
        missing: Seeds that others ran with and it did not.
        difference: Mean over the pairs of its score minus that of the reference; None without pairs.
        pairs: Seeds in which both it and the reference have a score.
        p: Of the paired permutation test against the reference; None without pairs.
        corrected_p: The same after Holm's correction over the methods of the table.
        rank: Mean over its seeds of its rank among the methods that ran with the seed, failed runs last.
    """

    contender: Contender
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
    def best(self) -> float:
        """Highest score of a seed; NaN without scores."""
        return max(self.values, default=math.nan)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bootstrap interval of the mean."""
        return mean_interval(self.values)


@dataclass(frozen=True)
class Overall:
    """How a method stands over all contests, each on the domain it was trained on.

    Attributes:
        contender: The method; its runs are those of its first contest.
        contests: Number of contests it took part in.
        rank: Mean over these contests of its rank.
        difference: Mean over the contests of its mean difference to the reference; None without pairs.
        better: Contests in which its mean difference is positive.
        pairs: Pairs with the reference over all contests.
        p: Of the paired permutation test over all pairs, in which contests weigh alike.
        corrected_p: The same after Holm's correction over the methods.
        finished: Runs with a score.
        failed: Runs without one.
    """

    contender: Contender
    contests: int
    rank: float
    difference: float | None
    better: int
    pairs: int
    p: float | None
    corrected_p: float | None
    finished: int
    failed: int


def standings(contest: Contest, domain: str) -> list[Standing]:
    """Work out how each method of a contest stands on one test domain.

    Args:
        contest: The contest.
        domain: One of its domains.
    """
    scores = {each.variant: each.scores(domain) for each in contest.contenders}
    by_seed: dict[str, list[float]] = {variant: [] for variant in scores}
    for seed in contest.seeds:
        present = [variant for variant in scores if seed in scores[variant]]
        for variant, rank in zip(present, ranks([scores[variant][seed] for variant in present]), strict=True):
            by_seed[variant].append(rank)
    found = []
    for each in contest.contenders:
        pairs = differences(contest, each, domain)
        found.append(
            Standing(
                contender=each,
                scores=scores[each.variant],
                missing=tuple(seed for seed in contest.seeds if seed not in each.runs),
                difference=statistics.fmean(pairs) if pairs else None,
                pairs=len(pairs),
                p=sign_flip_p(pairs),
                corrected_p=None,
                rank=statistics.fmean(by_seed[each.variant]),
            )
        )
    corrected = _corrected([each.p for each in found])
    return [replace(each, corrected_p=p) for each, p in zip(found, corrected, strict=True)]


def differences(contest: Contest, contender: Contender, domain: str) -> list[float]:
    """Return the paired differences to the reference, by seed; none for the reference itself, or without one.

    Args:
        contest: The contest.
        contender: One of its methods.
        domain: One of its domains.
    """
    if contest.reference is None or contest.reference is contender:
        return []
    own, others = contender.scores(domain), contest.reference.scores(domain)
    paired = (own[seed] - others[seed] for seed in own if seed in others)
    return [difference for difference in paired if not math.isnan(difference)]


def overall(contests: Sequence[Contest]) -> list[Overall]:
    """Work out how each method stands over all contests.

    Args:
        contests: The contests; those without any score are left out.
    """
    entered: dict[str, list[tuple[Contest, Standing]]] = {}
    for contest in contests:
        for standing in standings(contest, contest.domains[0]) if contest.domains else []:
            entered.setdefault(standing.contender.variant, []).append((contest, standing))
    found = []
    for places in entered.values():
        # A contest with few pairs weighs as much as one with many.
        paired = [differences(contest, own.contender, contest.domains[0]) for contest, own in places]
        means = [statistics.fmean(pairs) for pairs in paired if pairs]
        weighted = [difference / len(pairs) for pairs in paired for difference in pairs]
        own = [standing for _, standing in places]
        found.append(
            Overall(
                contender=own[0].contender,
                contests=len(places),
                rank=statistics.fmean(standing.rank for standing in own),
                difference=statistics.fmean(means) if means else None,
                better=sum(mean > 0 for mean in means),
                pairs=len(weighted),
                p=sign_flip_p(weighted),
                corrected_p=None,
                finished=sum(len(standing.values) for standing in own),
                failed=sum(standing.failed for standing in own),
            )
        )
    corrected = _corrected([each.p for each in found])
    return [replace(each, corrected_p=p) for each, p in zip(found, corrected, strict=True)]


def _corrected(values: Sequence[float | None]) -> list[float | None]:
    given = [value for value in values if value is not None]
    results = iter(holm(given))
    return [None if value is None else next(results) for value in values]
