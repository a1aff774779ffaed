from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_dps.masking.bits import pack

from peft_dps.masking import mask as masks
from peft_dps.masking.mask import Mask

both = pytest.mark.parametrize("in_bits", [True, False], ids=["bits", "bytes"])


def selection(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.6


@both
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (4, 8), (0, 3), (2, 3, 5)], ids=str)
def test_a_mask_is_minus_one_where_updated_and_zero_elsewhere(shape, in_bits):
    selected = selection(*shape)
    mask = Mask.of(selected.clone(), in_bits=in_bits)
    assert mask.keep.dtype is torch.int8
    assert mask.keep.shape == selected.shape
    assert torch.equal(mask.keep, -selected.to(torch.int8))
    assert torch.equal(mask.bits, pack(selected))


def test_a_cpu_keeps_bits():
    mask = Mask.of(selection(10, 100))
    assert mask.packed is not None
    assert mask.packed.nbytes == 125


def test_bytes_use_the_memory_of_the_selection():
    selected = selection(10)
    assert Mask.of(selected, in_bits=False).keep.data_ptr() == selected.data_ptr()


@both
def test_int8_is_taken_as_it_is(in_bits):
    keep = -selection(6, 7).to(torch.int8)
    assert torch.equal(Mask.of(keep.clone(), in_bits=in_bits).keep, keep)


@both
@pytest.mark.parametrize("inner", [1, 5, 8, 24])
def test_rows_of_a_mask(inner, in_bits):
    selected, indices = selection(20, inner), torch.tensor([[3, 19, 0], [3, 3, 7]])
    rows = Mask.of(selected.clone(), in_bits=in_bits).rows(indices)
    assert rows.shape == (2, 3, inner)
    assert torch.equal(rows.keep.bool(), selected[indices])


@both
def test_moving_a_mask_moves_what_it_keeps(in_bits):
    mask = Mask.of(selection(4, 4), in_bits=in_bits)
    moved = mask.to(torch.device("meta"))
    assert moved.device.type == "meta"
    assert (moved.packed is None) == (mask.packed is None)


@given(st.integers(0, 70), st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]), st.booleans())
def test_pieces_of_tensors_come_with_their_part_of_the_mask(size, dtype, in_bits):
    selected, tensor, other = selection(size), torch.arange(size).to(dtype), torch.arange(size).to(dtype)
    mask = Mask.of(selected.clone(), in_bits=in_bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_CPU_CHUNK", 16)
        for kept, piece, second in mask.along(tensor, other):
            assert piece.numel() <= 16
            piece.bitwise_and_(kept)
            second.bitwise_and_(~kept)
    assert torch.equal(tensor, torch.where(selected, torch.arange(size), 0).to(dtype))
    assert torch.equal(other, torch.where(selected, 0, torch.arange(size)).to(dtype))


@both
def test_tensors_that_cannot_be_cut_come_as_a_whole(in_bits):
    selected, tensor = selection(6, 5), torch.ones(5, 6, dtype=torch.int32).t()
    ((kept, piece),) = Mask.of(selected.clone(), in_bits=in_bits).along(tensor)
    assert piece.shape == (6, 5)
    piece.bitwise_and_(kept)
    assert torch.equal(tensor, selected.int())
