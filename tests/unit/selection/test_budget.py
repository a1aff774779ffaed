from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dps.errors import ConfigError
from peft_dps.selection.budget import BUDGETS, Candidates, EntryBudget, FlopsBudget, ShareBudget, UnitBudget
from peft_dps.selection.topk import SortableScores

densities = st.floats(0.0, 1.0, exclude_min=True)


@pytest.mark.parametrize(
    ("entries", "density", "expected"),
    [(10, 0.7, 7), (10, 0.71, 8), (3, 0.5, 2), (1, 1e-9, 1), (1, 1.0, 1), (0, 0.5, 0), (10**12, 1.0, 10**12)],
)
def test_count_is_rounded_up(entries, density, expected):
    assert EntryBudget(density).count(entries) == expected


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


def weights(*scores: float, sizes=None) -> list[Candidates]:
    """Weights or blocks with a unit each."""
    sizes = sizes or [(4,)] * len(scores)
    return [
        Candidates(SortableScores.of(torch.tensor([score], dtype=torch.float64)), tuple(size))
        for score, size in zip(scores, sizes, strict=True)
    ]


def chosen(budget, *problems, besides=0) -> list[list[bool]]:
    return [[bool(mask) for mask in masks] for masks in budget.choose(problems, besides)]


def test_the_best_weights_are_taken_until_their_entries_reach_the_density():
    problem = weights(3.0, 1.0, 2.0, sizes=[(4,), (10, 6), (4,)])
    assert chosen(EntryBudget(0.1), problem) == [[True, False, False]]
    assert chosen(EntryBudget(0.2), problem) == [[True, False, True]]
    assert chosen(EntryBudget(0.34), problem) == [[True, True, True]]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=8), densities, st.integers(0, 30)
)
@settings(deadline=None)
def test_what_is_trained_besides_is_charged(units, density, besides):
    scores, sizes = [float(score) for score, _ in units], [(size,) for _, size in units]
    total = sum(size for (size,) in sizes)
    limit = min(total + besides, math.ceil((total + besides) * density)) - besides
    if limit <= 0:
        with pytest.raises(ConfigError, match=rf"and {besides} are trained besides the selection"):
            EntryBudget(density).choose([weights(*scores, sizes=sizes)], besides)
        return
    (found,) = chosen(EntryBudget(density), weights(*scores, sizes=sizes), besides=besides)
    spent, expected = 0, set()
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if spent < limit:
            expected.add(index)
            spent += sizes[index][0]
    assert {index for index, one in enumerate(found) if one} == expected


def test_an_error_of_what_is_trained_besides_names_both_numbers():
    with pytest.raises(ConfigError, match=r"`density=0.5` is 6 of the 12 entries.*8 are trained besides.*Raise"):
        EntryBudget(0.5).choose([weights(1.0)], besides=8)


def test_units_are_a_number_whatever_their_size():
    problem = weights(3.0, 1.0, 2.0, sizes=[(4,), (10, 6), (400,)])
    assert chosen(UnitBudget(2), problem, besides=1000) == [[True, False, True]]
    assert chosen(UnitBudget(1), problem, weights(1.0, 2.0)) == [[True, False, False], [False, True]]
    with pytest.raises(ConfigError, match=r"`units` is 4, and a weight has only 3 of them \(the model"):
        UnitBudget(4).choose([problem])


def test_half_of_three_is_two_where_the_next_one_scores_best():
    three = [weights(0.9, 0.1, 0.4), weights(0.9, 0.8, 0.5), weights(0.2, 0.1, 0.3), weights(0.7, 0.6, 0.5)]
    assert chosen(ShareBudget(0.5), *three) == [
        [True, False, False], [True, True, False], [False, False, True], [True, True, False],
    ]  # fmt: skip
    assert [sum(each) for each in chosen(ShareBudget(0.5), *three[:3])] == [2, 2, 1], "rounded up over all"


def test_half_of_four_is_two_beside_problems_of_three():
    four, three = weights(0.1, 0.2, 0.3, 0.4), weights(0.9, 0.8, 0.7)
    sizes = [sum(each) for each in chosen(ShareBudget(0.5), four, three, four, three)]
    assert sizes == [2, 2, 2, 1]


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 64))
@settings(deadline=None)
def test_a_share_is_exact_over_all_problems_and_nearly_in_each(scores, parts):
    density = parts / 64  # exact, as all products with it
    found = chosen(ShareBudget(density), *(weights(*each) for each in scores))
    numbers = [len(each) for each in scores]
    assert sum(map(sum, found)) == math.ceil(sum(numbers) * density)
    for each, masks in zip(scores, found, strict=True):
        assert math.floor(len(each) * density) <= sum(masks) <= math.ceil(len(each) * density)
        left_out = [score for score, one in zip(each, masks, strict=True) if not one]
        assert all(score >= max(left_out, default=0) for score, one in zip(each, masks, strict=True) if one)


def test_flops_are_those_of_the_way_down_too():
    problem = weights(9.0, 1.0, 2.0)
    # A backward pass costs 24. The first weight costs 4, and 8 on the way to it.
    assert chosen(FlopsBudget(0.5), problem) == [[True, False, False]]
    assert chosen(FlopsBudget(0.45), problem) == [[False, False, True]]
    assert chosen(FlopsBudget(0.67), problem) == [[True, False, True]]
    # In a block with two weights the input's gradient of the second is on the way to the first.
    blocks = weights(9.0, 1.0, sizes=[(4, 4), (4,)])
    assert chosen(FlopsBudget(0.67), blocks) == [[True, False]]
    assert chosen(FlopsBudget(0.62), blocks) == [[False, True]]


def test_too_few_flops_for_any_weight_are_refused():
    with pytest.raises(ConfigError, match=r"`density=0.1` of the FLOPs.*too little to train any of the 3 units"):
        FlopsBudget(0.1).choose([weights(1.0, 1.0, 1.0)])


def test_budgets_have_names():
    assert type(BUDGETS.find("entries")(0.5, None, None)) is EntryBudget
    assert type(BUDGETS.find("units")(0.5, None, None)) is ShareBudget
    assert type(BUDGETS.find("flops")(0.5, None, None)) is FlopsBudget
    assert all(type(BUDGETS.find(name)(0.5, 2, None)) is UnitBudget for name in ("entries", "units"))
    with pytest.raises(ConfigError, match=r"`units=2` counts units, and `budget` is 'flops'"):
        BUDGETS.find("flops")(0.5, 2, None)
