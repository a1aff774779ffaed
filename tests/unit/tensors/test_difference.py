"""Bit differences: any bits come back, and damaged bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from peft_dps.errors import AdapterFileError
from peft_dps.tensors.difference import DTYPES, _decompress, _take_apart, decode, encode

WORDS = {
    torch.float16: np.int16, torch.bfloat16: np.int16, torch.float32: np.int32, torch.float64: np.int64,
}  # fmt: skip
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 1.0, -1.0]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(words), b.view(words))


def patterns(dtype: torch.dtype, size: int) -> st.SearchStrategy:
    words = st.integers(int(np.iinfo(WORDS[dtype]).min), int(np.iinfo(WORDS[dtype]).max))
    return arrays.arrays(WORDS[dtype], size, elements=words).map(lambda bits: torch.from_numpy(bits).view(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(0, 40))
def test_any_bits_come_back(dtype, data, size):
    values, reference = data.draw(patterns(dtype, size)), data.draw(patterns(dtype, size))
    before = values.clone(), reference.clone()
    assert same_bits(decode(encode(values, reference), reference), values)
    assert same_bits(values, before[0])
    assert same_bits(reference, before[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_special_values_against_each_other(dtype):
    smallest = torch.tensor(1, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)
    special = torch.cat([torch.tensor(SPECIAL, dtype=dtype), smallest[None], -smallest[None]])
    values, reference = special.repeat(10), special.repeat_interleave(10)
    assert same_bits(decode(encode(values, reference), reference), values)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (2, 3, 4)])
def test_shapes(shape):
    values, reference = torch.randn(shape), torch.randn(shape)
    assert same_bits(decode(encode(values, reference), reference), values)


def test_memory_that_is_not_contiguous():
    values, reference = torch.randn(6, 8).t()[::2], torch.randn(5, 6)[:4].flip(1).contiguous().expand(4, 6)
    assert same_bits(decode(encode(values, reference), reference), values.contiguous())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.62), (torch.bfloat16, 0.22)], ids=str)
def test_small_changes_take_little_room(dtype, most):
    generator = torch.Generator().manual_seed(0)
    reference = (0.05 * torch.randn(100_000, generator=generator)).to(dtype)
    values = (reference.float() + 2e-4 * torch.randn(100_000, generator=generator)).to(dtype)
    size = encode(values, reference).numel()
    assert size < most * values.numel() * values.element_size()
    assert sum(_take_apart(encode(reference, reference))[0].frames) < 200


def test_a_pretrained_weight_of_the_same_values_in_another_dtype_will_do():
    pretrained, values = torch.randn(50).bfloat16(), torch.randn(50)
    encoded = encode(values, pretrained)
    assert same_bits(decode(encoded, pretrained.double()), values)
    with pytest.raises(AdapterFileError, match="another pretrained weight"):
        decode(encoded, pretrained + 1e-2)


@pytest.fixture
def frames():
    return [bytes(frame) for frame in _take_apart(encode(torch.randn(1000), torch.zeros(1000)))[1]]


def test_each_flipped_byte_is_noticed(frames):
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(frames[1]), 40):
        altered = bytearray(frames[1])
        altered[position] ^= 1 << int(generator.integers(8))
        # One bit of a frame's head has no meaning; all else is refused.
        try:
            restored = _decompress(bytes(altered), 1000)
        except AdapterFileError:
            continue
        assert np.array_equal(restored, _decompress(frames[1], 1000))


@pytest.mark.parametrize("kept", [0, 3, 20, -1])
def test_a_frame_cut_short(frames, kept):
    with pytest.raises(AdapterFileError):
        _decompress(frames[0][:kept], 1000)


@pytest.mark.parametrize("kept", [0, 10, 33, 40, 200, -900, -1])
def test_bytes_cut_short(kept):
    with pytest.raises(AdapterFileError, match=r"cut short|neither a weight nor a difference"):
        decode(encode(torch.randn(1000), torch.zeros(1000))[:kept], torch.zeros(1000))


def test_too_few_frames():
    encoded = encode(torch.randn(1000), torch.zeros(1000)).numpy().tobytes()
    lengths = _take_apart(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))[0].frames
    told, fewer = str(lengths).encode(), str(lengths[:3]).encode()
    cut = encoded.replace(told, fewer.ljust(len(told)))[: -lengths[3]]
    with pytest.raises(AdapterFileError, match="3 bytes for an entry of 4"):
        decode(torch.frombuffer(bytearray(cut), dtype=torch.uint8), torch.zeros(1000))


def test_a_frame_that_would_grow_is_refused_before_it_does():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    assert len(bomb) < 10_000
    with pytest.raises(AdapterFileError, match="67108864 bytes in place of 1000"):
        _decompress(bomb, 1000)
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    unsized = stream.compress(bytes(1 << 26)) + stream.flush()
    with pytest.raises(AdapterFileError, match="in place of 1000"):
        _decompress(unsized, 1000)


def test_bytes_after_a_frame_are_refused(frames):
    with pytest.raises(AdapterFileError):
        _decompress(frames[0] + b"x", 1000)
