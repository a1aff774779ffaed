"""Which part of a split layer a process has; what processes tell each other is tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from peft_dps.tensors.split import EVERYTHING, Split, embedded

OUTPUTS = Split(None, 0, (7, 5), first=4, count=3)
INPUTS = Split(None, 1, (7, 5), first=3, count=2)


def test_a_process_has_a_part_of_one_axis():
    assert OUTPUTS.part_shape == (3, 5)
    assert INPUTS.part_shape == (7, 2)
    assert INPUTS.whole.part_shape == OUTPUTS.whole.part_shape == (7, 5)


@pytest.mark.parametrize(
    ("index", "slots", "places"), [([6, 0, 4], [0, 2], [2, 0]), ([0, 3], [], []), ([4, 5, 6], [0, 1, 2], [0, 1, 2])]
)
def test_units_are_found_among_those_of_the_process(index, slots, places):
    found = OUTPUTS.held(torch.tensor(index, dtype=torch.int32))
    assert [each.tolist() for each in found] == [slots, places]


@pytest.mark.parametrize("at", [torch.tensor([4, 1]), slice(2, 5), EVERYTHING])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_taking_a_part_and_putting_it_together_are_each_others_backward(at, axis):
    whole = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    part = OUTPUTS.part(whole, axis, at)
    expected = whole.movedim(axis, 0)[at].movedim(0, axis)
    assert torch.equal(part, expected)
    together = OUTPUTS.join(part, axis, at, 5)
    assert torch.equal(together, embedded(expected.detach(), axis, at, 5))
    assert torch.autograd.gradcheck(lambda tensor: OUTPUTS.join(OUTPUTS.part(tensor, axis, at), axis, at, 5), whole)
