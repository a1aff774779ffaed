from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dps import freezing
from peft_dps.freezing import (
    frozen_checksum,
    hold_frozen,
    keep_from_mask,
    restore_frozen_,
    zero_frozen_,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -2.5]
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, 1),
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "strided": lambda tensor: tensor[:, :, ::2],
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(INTS[tensor.element_size()])


def make_weight(dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
    """All kinds of bits: random ones, many of them NaN with a payload, and the special values."""
    random = torch.randint(-(2**15), 2**15, (4, 3, 4, 4 * torch.empty(0, dtype=dtype).element_size() // 2))
    weight = random.to(torch.int16).view(dtype).contiguous()
    weight[0, 0, :, :2] = torch.tensor(SPECIAL, dtype=dtype).view(4, 2)
    return LAYOUTS[layout](weight)


def make_mask(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.rand(weight.shape) < 0.5
    assert mask.any()
    assert not mask.all()
    return mask


def keep_of(mask: torch.Tensor) -> torch.Tensor:
    return keep_from_mask(mask.clone())


@pytest.fixture(params=[5, 1 << 18], ids=["many pieces", "one piece"], autouse=True)
def _piece(request, monkeypatch):
    monkeypatch.setattr(freezing, "_CPU_CHUNK", request.param)


every_case = pytest.mark.parametrize(
    ("dtype", "layout"), [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS], ids=str
)


# --- masks ---


def test_keep_has_all_bits_where_updated_and_none_where_frozen():
    keep = keep_from_mask(torch.tensor([[True, False], [False, True]]))
    assert keep.dtype is torch.int8
    assert keep.tolist() == [[-1, 0], [0, -1]]


def test_keep_uses_the_memory_of_the_mask():
    mask = torch.tensor([True, False])
    assert keep_from_mask(mask).data_ptr() == mask.data_ptr()


# --- gradients ---


@every_case
def test_frozen_gradients_become_plus_zero_and_others_keep_their_bits(dtype, layout):
    gradient = make_weight(dtype, layout)
    mask = make_mask(gradient)
    before = bits(gradient)
    zero_frozen_(gradient, keep_of(mask))
    assert torch.equal(bits(gradient), torch.where(mask, before, torch.zeros_like(before)))


# --- weights ---


@every_case
def test_frozen_entries_get_their_bits_back_and_others_keep_the_new_ones(dtype, layout):
    weight = make_weight(dtype, layout)
    mask = make_mask(weight)
    before = bits(weight)
    held = hold_frozen(weight, keep_of(mask))
    assert torch.equal(bits(weight), before)
    assert torch.equal(held, torch.where(mask, torch.zeros_like(before), before))

    with torch.no_grad():
        weight.copy_(make_weight(dtype, layout))  # other random bits everywhere
    after = bits(weight)
    restore_frozen_(weight, keep_of(mask), held)
    assert torch.equal(bits(weight), torch.where(mask, after, before))


@every_case
def test_restoring_what_has_not_moved_changes_no_bit(dtype, layout):
    weight = make_weight(dtype, layout)
    keep = keep_of(make_mask(weight))
    before = bits(weight)
    restore_frozen_(weight, keep, hold_frozen(weight, keep))
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_a_mask_of_another_layout_than_the_weight_means_the_same_entries(layout):
    weight = make_weight(torch.float32, layout)
    mask = make_mask(weight)
    other = keep_of(mask).contiguous()
    assert other.stride() != weight.stride()
    before = bits(weight)
    held = hold_frozen(weight, other)
    weight.zero_()
    restore_frozen_(weight, other, held)
    assert torch.equal(bits(weight), torch.where(mask, torch.zeros_like(before), before))


def test_parameters_that_require_grad_are_taken():
    weight = torch.nn.Parameter(torch.ones(4))
    keep = keep_from_mask(torch.tensor([True, False, True, False]))
    held = hold_frozen(weight, keep)
    weight.data.fill_(7.0)
    restore_frozen_(weight, keep, held)
    assert weight.tolist() == [7.0, 1.0, 7.0, 1.0]
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("selected", [True, False])
def test_masks_of_one_kind_freeze_nothing_or_everything(selected):
    weight = make_weight(torch.float32)
    keep = keep_from_mask(torch.full(weight.shape, selected))
    before = bits(weight)
    held = hold_frozen(weight, keep)
    weight.zero_()
    restore_frozen_(weight, keep, held)
    assert torch.equal(bits(weight), torch.zeros_like(before) if selected else before)


def test_empty_tensors_are_taken():
    weight, keep = torch.zeros(0, 3), keep_from_mask(torch.zeros(0, 3, dtype=torch.bool))
    restore_frozen_(weight, keep, hold_frozen(weight, keep))
    zero_frozen_(weight, keep)
    assert frozen_checksum(weight, keep) == 0


# --- the checksum ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_checksum_notices_one_moved_bit_of_any_frozen_entry_and_none_of_a_selected_one(dtype, layout, data):
    weight = make_weight(dtype, layout)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    keep = keep_of(mask)
    before = frozen_checksum(weight, keep)
    position = data.draw(st.tuples(*(st.integers(0, size - 1) for size in weight.shape)))
    bit = data.draw(st.integers(0, 8 * weight.element_size() - 1))

    integers = weight.view(INTS[weight.element_size()])
    integers[position] ^= torch.tensor(1).bitwise_left_shift(bit).to(integers.dtype)

    assert bool(frozen_checksum(weight, keep) == before) is bool(mask[position])


@given(st.integers(0, 29), st.integers(0, 29))
@settings(max_examples=60, deadline=None)
def test_checksum_notices_two_frozen_entries_that_change_places(first, second):
    weight = torch.arange(1.0, 31.0)
    keep = torch.zeros(30, dtype=torch.int8)
    before = frozen_checksum(weight, keep)
    weight[[first, second]] = weight[[second, first]]
    assert bool(frozen_checksum(weight, keep) == before) is (first == second)


def test_checksum_notices_a_zero_that_changes_its_sign():
    weight, keep = torch.zeros(20), torch.zeros(20, dtype=torch.int8)
    before = frozen_checksum(weight, keep)
    weight[13] = -0.0
    assert frozen_checksum(weight, keep) != before


def test_checksum_is_an_int64_scalar_that_repeats():
    weight = make_weight(torch.bfloat16)
    keep = keep_of(make_mask(weight))
    first = frozen_checksum(weight, keep)
    assert (first.dtype, first.shape) == (torch.int64, ())
    assert frozen_checksum(weight, keep) == first
