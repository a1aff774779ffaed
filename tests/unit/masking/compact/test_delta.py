"""What a compact adapter holds, against a dictionary of what each unit has learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dps.masking.compact.delta import Delta, EntryDelta, set_values, slot_axis
from peft_dps.masking.compact.whole import WholeDelta
from peft_dps.tensors.layout import Units, experts, in_out, out_in

ROWS, COLUMNS = 4, 6
LAYOUT = out_in((ROWS, COLUMNS))
LIKE = torch.empty((), dtype=torch.float64)


def numbers_of(chosen) -> torch.Tensor:
    return torch.tensor(sorted(chosen), dtype=torch.int32)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["row", "column", "entry"]),
    selections=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6),
)
def test_units_keep_what_they_learned_wherever_they_are(kind, selections):
    units = {"row": LAYOUT.rows, "column": LAYOUT.columns, "entry": LAYOUT.entries}[kind]
    delta = (EntryDelta if kind == "entry" else Delta)(units, len(selections[0]), LIKE)
    learned: dict[int, torch.Tensor] = {}
    base = torch.zeros(LAYOUT.shape, dtype=torch.float64)
    for step, chosen in enumerate(selections):
        before = delta.index.clone()
        if step == 0:
            delta.take(numbers_of(chosen), lambda: base)
        else:
            moved = delta.exchange(numbers_of(chosen), lambda: base, lambda values: set_values(delta.weight, values))
            for slot, old in enumerate(moved.tolist()):
                unit = int(delta.index[slot])
                assert (old >= 0) == (unit in before.tolist())
                assert old < 0 or int(before[old]) == unit
                assert len(before) != len(moved) or old in (-1, slot), "units that stay keep their slots"
        assert set(delta.index.tolist()) == set(chosen)
        assert set(delta.held.tolist()) == set(learned) | set(chosen)
        for slot, unit in enumerate(delta.index.tolist()):
            own = delta.weight.detach().select(delta.axis, slot)
            assert torch.equal(own, learned.get(unit, torch.zeros_like(own)))
            own += 1.0 + unit + 10 * step  # what a step of training brings
            learned[unit] = own.clone()
        dense = torch.zeros(LAYOUT.shape, dtype=torch.float64)
        for unit, values in learned.items():
            if kind == "entry":
                dense.view(-1)[unit] = values
            else:
                dense.select(delta.axis, unit).copy_(values)
        assert torch.equal(delta.dense(base), dense)


def test_a_whole_weight_comes_back_with_what_it_learned():
    base = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    delta = WholeDelta(LAYOUT.whole, 0, LIKE)
    assert torch.equal(delta.applied(base), base)
    delta.take(numbers_of([0]), lambda: base)
    assert torch.equal(delta.weight, base)
    assert delta.weight.data_ptr() != base.data_ptr()
    delta.weight.data += 1.0
    write = lambda values: set_values(delta.weight, values)  # noqa: E731
    assert delta.exchange(numbers_of([]), lambda: base, write).tolist() == []
    assert delta.weight.numel() == 0
    assert torch.equal(delta.applied(base), base + 1.0)
    assert delta.exchange(numbers_of([0]), lambda: base, write).tolist() == [-1]
    assert torch.equal(delta.weight, base + 1.0)
    assert delta.kept is None


@pytest.mark.parametrize(
    ("units", "axis"),
    [
        (out_in((4, 6)).rows, 0),
        (out_in((4, 6)).columns, 1),
        (in_out((4, 6)).rows, 1),
        (in_out((4, 6)).columns, 0),
        (out_in((4, 6, 3)).columns, 1),
        (out_in((4, 1)).columns, 1),
        (out_in((1, 6)).columns, 1),
        (out_in((4, 6, 3), groups=2).columns, -1),
        (experts((2, 4, 6), transposed=False).rows, -1),
        (Units((4, 6), 2, (1,)), -1),
    ],
)
def test_the_axis_of_units(units, axis):
    assert slot_axis(units) == axis


def test_a_parameter_of_another_shape_may_be_used_while_an_old_loss_lives():
    parameter = torch.nn.Parameter(torch.ones(3))
    old = (parameter * 2).sum()
    old.backward()
    set_values(parameter, torch.ones(5))
    (parameter * 3).sum().backward()
    assert parameter.grad.tolist() == [3.0] * 5
