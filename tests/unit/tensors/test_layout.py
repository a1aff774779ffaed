"""Where rows and columns lie, against loops over entries."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_dps.errors import ConfigError
from peft_dps.tensors import layout
from peft_dps.tensors.layout import Layout, Units, experts, in_out, out_in

# Per layout, which row, which column and which tile an entry is of; tiles have up to three rows and columns.
CASES = {
    "linear": (out_in((5, 6)), lambda i: i[0], lambda i: i[1], lambda i: (i[0], i[1] // 3)),
    "transposed": (in_out((6, 5)), lambda i: i[1], lambda i: i[0], lambda i: (i[0] // 3, i[1])),
    "convolution": (out_in((6, 4, 2, 3)), lambda i: i[0], lambda i: i[1], lambda i: (i[0] // 3, i[1] // 2)),
    "groups": (out_in((8, 2, 3), groups=2), lambda i: i[0], lambda i: (i[0] // 4, i[1]), lambda i: i[0] // 2),
    "depthwise": (out_in((6, 1, 3), groups=6), lambda i: i[0], lambda i: (i[0], i[1]), lambda i: i[0]),
    "experts": (
        experts((3, 4, 5), transposed=False),
        lambda i: (i[0], i[1]), lambda i: (i[0], i[2]), lambda i: (i[0], i[1] // 2, i[2]),
    ),
    "transposed experts": (
        experts((3, 5, 4), transposed=True),
        lambda i: (i[0], i[2]), lambda i: (i[0], i[1]), lambda i: (i[0], i[1], i[2] // 2),
    ),
}  # fmt: skip


def units_of(case: str) -> list[tuple[Units, object]]:
    found, row, column, tile = CASES[case]
    return [
        (found.tiles(3), tile),
        (found.rows, row),
        (found.columns, column),
        (found.whole, lambda _: 0),
        (found.entries, lambda index: index),
    ]


def numbered(shape, name) -> torch.Tensor:
    """The number of the unit of each entry."""
    names = [name(index) for index in product(*map(range, shape))]
    order = {unit: number for number, unit in enumerate(dict.fromkeys(sorted(set(names))))}
    return torch.tensor([order[unit] for unit in names]).view(shape)


@pytest.mark.parametrize("case", CASES)
def test_units_are_those_of_the_layer(case):
    for units, name in units_of(case):
        numbers = numbered(units.shape, name)
        assert units.count == len(numbers.unique())
        assert units.size * units.count == numbers.numel()
        assert torch.equal(units.expand(torch.arange(units.count)), numbers)
        values = torch.rand(units.shape)
        sums = torch.zeros(units.count, dtype=torch.float64).index_add_(0, numbers.view(-1), values.view(-1).double())
        torch.testing.assert_close(units.sums(values), sums, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES)
@given(cuts=st.lists(st.integers(0, 6), max_size=3), chunk=st.sampled_from([1, 7, 1 << 18]))
def test_parts_add_up_to_the_whole(case, cuts, chunk):
    for units, _ in units_of(case):
        rows = units.shape[0]
        edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
        values, numbers = torch.rand(units.shape), torch.arange(units.count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "_CHUNK", chunk)
            parts = [units.sums(values[a:b], a) for a, b in pairwise(edges)]
        torch.testing.assert_close(torch.stack(parts).sum(0), units.sums(values), rtol=1e-12, atol=0)
        for a, b in pairwise(edges):
            assert torch.equal(units.expand(numbers, a, b - a), units.expand(numbers)[a:b])
            spread = units.spread(numbers, a, b - a)
            assert torch.equal(spread.expand(b - a, *units.shape[1:]), units.expand(numbers)[a:b])


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_put_together_from_its_units(case):
    for units, name in units_of(case):
        values, numbers = torch.rand(units.shape), numbered(units.shape, name)
        cut = units.split(values).reshape(units.count, -1)
        for number in range(units.count):
            assert sorted(cut[number].tolist()) == sorted(values[numbers == number].tolist())
        assert units.split(values).shape == (*units.grid, *units.span)
        assert torch.equal(units.join(cut.view(units.count, *units.span)), values)


def test_tiles_of_large_matrices_have_256_rows_and_columns():
    tiles = out_in((1024, 768)).tiles()
    assert (tiles.grid, tiles.span) == ((4, 3), (256, 256))
    assert out_in((300, 514)).tiles().span == (150, 2)  # 514 = 2 * 257


def test_sums_are_the_same_in_every_run():
    units = out_in((300, 700)).columns
    values = torch.rand(300, 700)
    assert torch.equal(units.sums(values), units.sums(values))


def test_units_of_unequal_size_are_refused():
    with pytest.raises(ConfigError, match=r"shape \(3, 16\) cannot be cut into equal units of 2 rows"):
        Units((3, 16), 2, (1,))


def test_a_vector_has_no_columns_but_entries():
    vector = Layout((7,), None, None)
    assert (vector.entries.count, vector.whole.count, vector.tiles()) == (7, 1, None)
    assert torch.equal(vector.whole.sums(torch.ones(7)), torch.tensor([7.0], dtype=torch.float64))
