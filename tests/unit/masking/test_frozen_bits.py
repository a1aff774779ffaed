from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dps.masking import mask as masks
from peft_dps.masking.frozen_bits import (
    frozen_checksum,
    hold_frozen,
    restore_from_snapshot_,
    restore_frozen_,
    zero_frozen_,
)
from peft_dps.masking.mask import Mask

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


@pytest.fixture(params=[True, False], ids=["bits", "bytes"])
def masked(request):
    """Make a mask that is kept in bits or in bytes."""
    return lambda selected: Mask.of(selected.clone(), in_bits=request.param)


@pytest.fixture(params=[16, 1 << 19], ids=["many pieces", "one piece"], autouse=True)
def _piece(request, monkeypatch):
    monkeypatch.setattr(masks, "_CPU_CHUNK", request.param)


every_case = pytest.mark.parametrize(
    ("dtype", "layout"), [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS], ids=str
)


# --- gradients ---


@every_case
def test_frozen_gradients_become_plus_zero_and_others_keep_their_bits(dtype, layout, masked):
    gradient = make_weight(dtype, layout)
    mask = make_mask(gradient)
    before = bits(gradient)
    zero_frozen_(gradient, masked(mask))
    assert torch.equal(bits(gradient), torch.where(mask, before, torch.zeros_like(before)))


# --- weights ---


@every_case
def test_frozen_entries_get_their_bits_back_and_others_keep_the_new_ones(dtype, layout, masked):
    weight = make_weight(dtype, layout)
    mask = make_mask(weight)
    before = bits(weight)
    held = hold_frozen(weight, masked(mask))
    assert torch.equal(bits(weight), before)
    assert torch.equal(held, torch.where(mask, torch.zeros_like(before), before))

    with torch.no_grad():
        weight.copy_(make_weight(dtype, layout))  # other random bits everywhere
    after = bits(weight)
    restore_frozen_(weight, masked(mask), held)
    assert torch.equal(bits(weight), torch.where(mask, after, before))


@every_case
def test_a_snapshot_gives_frozen_entries_their_bits_back(dtype, layout, masked):
    weight = make_weight(dtype, layout)
    mask = make_mask(weight)
    snapshot = weight.clone()
    with torch.no_grad():
        weight.copy_(make_weight(dtype, layout))
    after = bits(weight)
    restore_from_snapshot_(weight, masked(mask), snapshot)
    assert torch.equal(bits(weight), torch.where(mask, after, bits(snapshot)))


def test_frozen_bits_are_kept_in_the_memory_that_is_given(masked):
    weight = make_weight(torch.float32)
    scores = torch.empty_like(weight)
    held = hold_frozen(weight, masked(make_mask(weight)), scores)
    assert held.data_ptr() == scores.data_ptr()


@every_case
def test_restoring_what_has_not_moved_changes_no_bit(dtype, layout, masked):
    weight = make_weight(dtype, layout)
    keep = masked(make_mask(weight))
    before = bits(weight)
    restore_frozen_(weight, keep, hold_frozen(weight, keep))
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_a_mask_of_another_layout_than_the_weight_means_the_same_entries(layout, masked):
    weight = make_weight(torch.float32, layout)
    mask = make_mask(weight)
    other = masked(mask.contiguous())
    assert mask.contiguous().stride() != weight.stride()
    before = bits(weight)
    held = hold_frozen(weight, other)
    weight.zero_()
    restore_frozen_(weight, other, held)
    assert torch.equal(bits(weight), torch.where(mask, torch.zeros_like(before), before))


def test_parameters_that_require_grad_are_taken(masked):
    weight = torch.nn.Parameter(torch.ones(4))
    keep = masked(torch.tensor([True, False, True, False]))
    held = hold_frozen(weight, keep)
    weight.data.fill_(7.0)
    restore_frozen_(weight, keep, held)
    assert weight.tolist() == [7.0, 1.0, 7.0, 1.0]
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("selected", [True, False])
def test_masks_of_one_kind_freeze_nothing_or_everything(selected, masked):
    weight = make_weight(torch.float32)
    keep = masked(torch.full(weight.shape, selected))
    before = bits(weight)
    held = hold_frozen(weight, keep)
    weight.zero_()
    restore_frozen_(weight, keep, held)
    assert torch.equal(bits(weight), torch.zeros_like(before) if selected else before)


def test_empty_tensors_are_taken(masked):
    weight, mask = torch.zeros(0, 3), masked(torch.zeros(0, 3, dtype=torch.bool))
    restore_frozen_(weight, mask, hold_frozen(weight, mask))
    zero_frozen_(weight, mask)
    assert frozen_checksum(weight, mask.keep) == 0


# --- the checksum ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_checksum_notices_one_moved_bit_of_any_frozen_entry_and_none_of_a_selected_one(dtype, layout, data):
    weight = make_weight(dtype, layout)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    keep = Mask.of(mask.clone()).keep
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
    keep = Mask.of(make_mask(weight)).keep
    first = frozen_checksum(weight, keep)
    assert (first.dtype, first.shape) == (torch.int64, ())
    assert frozen_checksum(weight, keep) == first
