from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def in_octets(flags: list[bool]) -> list[int]:
    """Eight entries a byte, the first in the lowest bit."""
    return [sum(flag << place for place, flag in enumerate(flags[at : at + 8])) for at in range(0, len(flags), 8)]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (4, 8), (0, 3), (2, 3, 5)], ids=str)
def test_bits_are_eight_entries_a_byte(shape):
    selected = selection(*shape)
    assert Mask.of(selected.clone(), in_bits=True).stored.tolist() == in_octets(selected.flatten().tolist())


@given(st.integers(0, 70), st.integers(0, 2**32))
def test_bits_lose_nothing(entries, seed):
    selected = torch.rand(entries, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = Mask.of(selected.clone(), in_bits=True)
    assert mask.stored.numel() == -(-entries // 8)
    assert torch.equal(mask.keep.bool(), selected)


def test_bits_are_the_same_in_pieces():
    selected = torch.rand(1100, 1000) < 0.3
    assert torch.equal(Mask.of(selected.clone(), in_bits=True).keep.bool(), selected)


@both
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (4, 8), (0, 3), (0, 8), (4, 2, 4), (2, 3, 5)], ids=str)
def test_what_is_saved_of_a_mask_can_be_cut_by_rows(shape, in_bits):
    selected = selection(*shape)
    state = Mask.of(selected.clone(), in_bits=in_bits).state()
    assert state.dtype is torch.uint8
    assert tuple(state.shape) == Mask.state_shape(selected.shape)
    for rows in (slice(None), slice(0, 1), slice(1, None), slice(0, 0)):
        part = selected[rows]
        assert torch.equal(Mask.load(state[rows], part.shape).keep, -part.to(torch.int8))


def test_what_is_saved_of_a_mask_is_bits_where_rows_fill_whole_bytes():
    assert Mask.state_shape(torch.Size([16, 4, 4])) == (16, 2)
    assert Mask.state_shape(torch.Size([16, 12])) == (16, 12)


@both
def test_what_is_loaded_is_saved_as_the_same(in_bits):
    for shape in ((5, 16), (5, 6)):
        state = Mask.of(selection(*shape), in_bits=in_bits).state()
        assert torch.equal(Mask.load(state, torch.Size(shape)).state(), state)


def test_a_cpu_keeps_bits():
    mask = Mask.of(selection(10, 100))
    assert mask.in_bits
    assert mask.stored.nbytes == 125


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
    assert moved.in_bits is mask.in_bits


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
