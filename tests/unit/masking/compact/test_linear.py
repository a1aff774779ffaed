"""Selected columns and rows of a linear layer, against plain operations on a whole weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_dps.masking.compact.entries import linear_with_entries
from peft_dps.masking.compact.linear import add_columns, add_rows

IN, OUT, BATCH = 9, 7, (3, 4)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def whole(axis: int, parts) -> torch.Tensor:
    delta = torch.zeros(OUT, IN, dtype=torch.float64)
    for values, index in parts:
        delta = delta.index_add(axis, index, values)
    return delta


def make_parts(axis: int, kept: bool):
    shape = (OUT, 3) if axis == 1 else (3, IN)
    trained = torch.randn(shape, dtype=torch.float64).requires_grad_(), torch.tensor([5, 0, 2], dtype=torch.int32)
    if not kept:
        return [trained]
    shape = (OUT, 1) if axis == 1 else (1, IN)
    return [trained, (torch.randn(shape, dtype=torch.float64), torch.tensor([4], dtype=torch.int32))]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("axis", "add"), [(1, add_columns), (0, add_rows)])
@pytest.mark.parametrize("input_trains", [False, True])
def test_it_computes_what_a_whole_weight_does(axis, add, kept, input_trains):
    weight, bias = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    x = torch.randn(*BATCH, IN, dtype=torch.float64, requires_grad=input_trains)
    parts = make_parts(axis, kept)
    values, index = parts[0]
    up = torch.randn(*BATCH, OUT, dtype=torch.float64)
    expected = F.linear(x, weight + whole(axis, parts), bias)
    wanted = torch.autograd.grad((expected * up).sum(), [values, x] if input_trains else [values])

    actual = add(lambda seen: F.linear(seen, weight, bias), x, values, index, parts[1] if kept else None)
    found = torch.autograd.grad((actual * up).sum(), [values, x] if input_trains else [values])

    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("axis", "add"), [(1, add_columns), (0, add_rows)])
def test_other_uses_of_the_input_keep_their_gradient(axis, add):
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    parts = make_parts(axis, kept=False)
    x = torch.randn(*BATCH, IN, dtype=torch.float64, requires_grad=True)
    expected = F.linear(x, weight + whole(axis, parts)).sum() + (x**2).sum()
    actual = add(lambda seen: F.linear(seen, weight), x, *parts[0]).sum() + (x**2).sum()
    (wanted,), (found,) = torch.autograd.grad(expected, [x]), torch.autograd.grad(actual, [x])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("axis", "add"), [(1, add_columns), (0, add_rows)])
def test_a_later_module_may_write_into_the_output(axis, add):
    parts = make_parts(axis, kept=False)
    x = torch.randn(*BATCH, IN, dtype=torch.float64)
    weight, bias = torch.randn(OUT, IN, dtype=torch.float64), torch.zeros(OUT, dtype=torch.float64)
    y = add(lambda seen: F.linear(seen, weight, bias), x, *parts[0])
    expected = torch.relu(F.linear(x, weight + whole(axis, parts)))
    torch.testing.assert_close(torch.relu_(y), expected, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert parts[0][0].grad is not None


@pytest.mark.parametrize(("axis", "add", "share"), [(1, add_columns, 3 / IN), (0, add_rows, 1.0)])
def test_backward_keeps_the_selected_columns_of_the_input_alone(axis, add, share):
    kept: dict[int, int] = {}
    parts = make_parts(axis, kept=False)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    own = {tensor.untyped_storage().data_ptr() for tensor in (weight, *parts[0])}
    x = torch.randn(*BATCH, IN, dtype=torch.float64, requires_grad=True)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = add(lambda seen: F.linear(seen, weight), x, *parts[0])
    assert sum(kept.values()) == x.nbytes * share
    y.sum().backward()


@pytest.mark.parametrize(("axis", "add"), [(1, add_columns), (0, add_rows)])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(axis, add):
    parts = [(values.detach().float().requires_grad_(), index) for values, index in make_parts(axis, kept=False)]
    weight, x = torch.randn(OUT, IN), torch.randn(*BATCH, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = add(lambda seen: F.linear(seen, weight), x, *parts[0])
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert parts[0][0].grad.dtype is torch.float32
    expected = F.linear(x, weight + whole(axis, [(parts[0][0].double(), parts[0][1])]).float())
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("input_axis", [0, 1])
def test_entries_compute_what_a_whole_weight_does(input_axis):
    weight = torch.randn(*((OUT, IN) if input_axis == 1 else (IN, OUT)), dtype=torch.float64)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*BATCH, IN, dtype=torch.float64, requires_grad=True)
    values, index = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.tensor([8, 3, 60, 31]).int()
    up = torch.randn(*BATCH, OUT, dtype=torch.float64)
    whole_weight = (weight.view(-1) + torch.zeros(OUT * IN, dtype=torch.float64).index_add(0, index, values)).view_as(
        weight
    )
    expected = F.linear(x, whole_weight if input_axis == 1 else whole_weight.t(), bias)
    wanted = torch.autograd.grad((expected * up).sum(), [values, x, bias])
    actual = linear_with_entries(x, weight, bias, [(values, index)], input_axis=input_axis)
    found = torch.autograd.grad((actual * up).sum(), [values, x, bias])
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
