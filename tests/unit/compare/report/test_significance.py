from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dps.compare.report.significance import LEVEL, holm, least_p, mean_interval, pairs_needed, ranks, sign_flip_p


def counted_p(differences):
    """Count sign patterns one by one."""
    values = np.asarray(differences)
    means = np.array([np.mean(values * signs) for signs in product((1, -1), repeat=len(values))])
    above, below = (means >= values.mean() - 1e-12).mean(), (means <= values.mean() + 1e-12).mean()
    return min(1.0, 2 * min(above, below))


@pytest.mark.parametrize("pairs", [2, 5, 8])
def test_p_counts_all_sign_patterns(pairs):
    differences = list(np.random.default_rng(pairs).normal(0.5, 1, pairs))
    assert sign_flip_p(differences) == pytest.approx(counted_p(differences))


def test_p_of_five_pairs_is_at_best_2_of_32():
    assert (
        sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.4]) == sign_flip_p([-0.1, -0.2, -0.3, -0.1, -0.4]) == 2 / 32 == least_p(5)
    )


@pytest.mark.parametrize("pairs", [14, 15, 40])
def test_no_p_is_smaller_than_the_least(pairs):
    assert sign_flip_p([0.5 + 0.01 * index for index in range(pairs)]) == pytest.approx(least_p(pairs))


def test_equal_scores_are_no_difference():
    assert sign_flip_p([0.0] * 5) == 1
    # Equal in decimal, not in binary: three differences of 0.1 and one of -0.3 leave nothing.
    assert sign_flip_p([0.3 - 0.2, 0.8 - 0.7, 0.1, -0.3]) == 1
    # Nor do these, though their sum in binary does.
    assert sign_flip_p([0.05, 0.05, -0.025, -0.025, -0.025, -0.025]) == 1
    assert sign_flip_p([]) is sign_flip_p([0.5]) is None  # one pair tells nothing


def test_p_does_not_change_from_call_to_call():
    differences = list(np.random.default_rng(3).normal(0.1, 1, 20))
    assert sign_flip_p(differences) == sign_flip_p(differences)
    assert mean_interval(differences) == mean_interval(differences)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_raises_p_and_keeps_its_order(values):
    corrected = holm(values)
    assert all(own <= new <= 1 for own, new in zip(values, corrected, strict=True))
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [corrected[index] for index in order] == sorted(corrected)
    assert min(corrected) == pytest.approx(min(1, len(values) * min(values)))


@pytest.mark.parametrize("comparisons", [1, 4, 9, 40])
def test_pairs_needed_are_enough_and_one_less_is_not(comparisons):
    pairs = pairs_needed(comparisons)
    assert comparisons * least_p(pairs) <= LEVEL < comparisons * least_p(pairs - 1)


def test_interval_lies_around_the_mean():
    low, high = mean_interval([0.7, 0.8, 0.9, 0.75])
    assert 0.7 < low < 0.7875 < high < 0.9
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert mean_interval([0.5]) is None


def test_interval_of_five_normal_scores_covers_as_the_report_says():
    draws = np.random.default_rng(0).normal(0, 1, (400, 5))
    covered = [low < 0 < high for low, high in (mean_interval(list(row)) for row in draws)]
    assert np.mean(covered) == pytest.approx(0.84, abs=0.04)


def test_ranks_share_and_put_failures_last():
    assert ranks([0.5, 0.9, float("nan"), 0.9, float("nan")]) == [3, 1.5, 4.5, 1.5, 4.5]
