"""The weights that a backward pass can train within a number of FLOPs: all sets of them are tried."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dps.selection.backward_flops import best_within_flops

# Small integers as scores make ties, and sums without rounding.
units = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 12), min_size=1, max_size=3)), min_size=1, max_size=7
)


def cost_of(chosen, sizes) -> int:
    """Gradients of the chosen weights, and of the inputs of all that lie above the lowest of them."""
    flat = [(size, one) for each, one in zip(sizes, chosen, strict=True) for size in each]
    lowest = next(index for index, (_, one) in enumerate(flat) if one)
    return sum(size for size, one in flat if one) + sum(size for size, _ in flat[lowest + 1 :])


@given(units, st.floats(0.0, 1.0))
@settings(max_examples=300, deadline=None)
def test_it_is_the_best_of_all_sets(units, density):
    scores, sizes = [score for score, _ in units], [each for _, each in units]
    limit = density * 2 * sum(map(sum, sizes))
    sets = [each for each in product([False, True], repeat=len(units)) if any(each)]
    within = [each for each in sets if cost_of(each, sizes) <= limit]
    found = best_within_flops(scores, sizes, limit)
    if not within:
        assert found is None
        return
    assert cost_of(found, sizes) <= limit
    assert value_of(found, scores) == max(value_of(each, scores) for each in within)


def value_of(chosen, scores) -> int:
    return sum(score for score, one in zip(scores, chosen, strict=True) if one)


@given(units, st.floats(0.0, 1.0), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_rounded_costs_are_within_the_limit_too(units, density, resolution):
    scores, sizes = [score for score, _ in units], [each for _, each in units]
    limit = density * 2 * sum(map(sum, sizes))
    found = best_within_flops(scores, sizes, limit, resolution)
    exact = best_within_flops(scores, sizes, limit)
    assert (found is None) == (exact is None), "what the lowest one costs is never rounded"
    if found is not None:
        assert cost_of(found, sizes) <= limit
        assert value_of(found, scores) <= value_of(exact, scores)


def test_a_common_divisor_keeps_large_sizes_exact():
    sizes = [[3 << 30], [5 << 30], [2 << 30]]
    limit = (5 + 2 + 2) << 30
    assert best_within_flops([1.0, 2.0, 1.0], sizes, limit) == [False, True, True]
    assert best_within_flops([1.0, 2.0, 1.0], sizes, limit - 1) == [False, True, False]


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
def test_without_a_difference_little_is_trained(scores):
    found = best_within_flops(scores, [[4], [4], [4]], 4)
    assert found == [False, False, True]
