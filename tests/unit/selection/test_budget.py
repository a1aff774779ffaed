from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dps.errors import ConfigError
from peft_dps.selection.budget import SCOPES, EntryBudget

densities = st.floats(0.0, 1.0, exclude_min=True)


@pytest.mark.parametrize(
    ("entries", "density", "expected"),
    [(10, 0.7, 7), (10, 0.71, 8), (3, 0.5, 2), (1, 1e-9, 1), (1, 1.0, 1), (0, 0.5, 0), (10**12, 1.0, 10**12)],
)
def test_count_is_rounded_up(entries, density, expected):
    assert EntryBudget(density).count(entries) == expected
    assert EntryBudget(density).limit(entries) == expected


@given(st.integers(0, 10**12), densities)
def test_count_is_never_more_than_there_are_and_never_none_of_some(entries, density):
    count = EntryBudget(density).count(entries)
    assert count == math.ceil(entries * density)
    assert min(entries, 1) <= count <= entries


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, math.nan, math.inf, True, "0.5", None])
def test_a_density_out_of_range_is_refused_by_field_and_value(density):
    with pytest.raises(ConfigError, match=rf"`density` must be in \(0, 1\], got {density!r}"):
        EntryBudget(density)


@pytest.mark.parametrize(("density", "takes_all"), [(1.0, True), (1, True), (0.999, False)])
def test_only_at_density_1_everything_is_selected(density, takes_all):
    assert EntryBudget(density).takes_all is takes_all


def test_weights_are_ranked_each_by_itself_or_all_together():
    tensor, model = SCOPES.find("tensor")(), SCOPES.find("model")()
    assert tensor.problems(3) == [[0], [1], [2]]
    assert model.problems(3) == [[0, 1, 2]]
    assert tensor.problems(0) == model.problems(0) == []
