"""What can be said of a difference seen in a few seeds: intervals, tests, corrections, ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
LEVEL = 0.05
RESAMPLES = 9_999
FLIPS = 2**14
"""Up to this many sign patterns are gone through one by one; of more, as many are drawn."""

_UNIT = 1e-12  # differences are counted in these, so that sums are exact and ties are ties


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean, at a confidence of 95%.

    Resampling starts from the same state every time: equal values give equal intervals.

    Args:
        values: One score per seed.

    Returns:
        Lower and upper end; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    drawn = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(drawn.low), float(drawn.high)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of the paired permutation test on the mean difference.

    If two methods do not differ, each pair of scores could as well have come out the other way round, which flips the
    sign of its difference. p is twice the share of sign patterns whose mean is at least as extreme as the one seen, at
    its side. Up to 14 pairs all patterns are counted; beyond, 16,384 are drawn, from the same state every time.

    Args:
        differences: Per pair, the score of one method minus that of the other.

    Returns:
        p; None for fewer than two pairs, which tell nothing.
    """
    if len(differences) < 2:
        return None
    test = stats.permutation_test(
        (np.rint(np.asarray(differences, dtype=float) / _UNIT),),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        alternative="two-sided",
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def least_p(pairs: int) -> float:
    """Return the smallest p that `sign_flip_p` can give: 2 of the 2^pairs sign patterns, for 5 pairs 2/32."""
    return min(1.0, 2 / 2**pairs) if 2**pairs <= FLIPS else 2 / (FLIPS + 1)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Correct p values for being the picks of many (Holm, Scandinavian Journal of Statistics 6, 1979).

    The i-th smallest of m, counted from 0, is multiplied by m - i, made no smaller than the one before it, and cut at
    1. The chance of one or more false rejections among all of them then is at most the level. Where nothing was
    tested there is None.
    """
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    tested = sorted((value, index) for index, value in enumerate(values) if value is not None)
    for position, (value, index) in enumerate(tested):
        largest = max(largest, value * (len(tested) - position))
        corrected[index] = min(1.0, largest)
    return corrected


def pairs_needed(comparisons: int) -> int:
    """Return how many pairs the clearest of so many differences needs to be significant after Holm's correction."""
    return math.ceil(math.log2(2 * max(1, comparisons) / LEVEL))


def ranks(scores: Sequence[float]) -> list[float]:
    """Rank scores, 1 for the highest; equal ones share their mean rank, and those that are NaN the last."""
    values = np.round(np.asarray(scores, dtype=float), 12)  # means of equal scores may differ in the last bit
    return [float(rank) for rank in stats.rankdata(np.where(np.isnan(values), np.inf, -values))]
