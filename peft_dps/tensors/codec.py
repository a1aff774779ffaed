"""A tensor as the difference of its bits to those of a reference: compressed bytes, and back to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard

from peft_dps.errors import AdapterFileError

# Higher levels look for repetitions, of which there are none: they are slower and no smaller.
_LEVEL = 1
# Per floating dtype: the integers of its size, and the bits of its mantissa.
_LAYOUTS = {
    torch.float16: (torch.int16, np.uint16, 10),
    torch.bfloat16: (torch.int16, np.uint16, 7),
    torch.float32: (torch.int32, np.uint32, 23),
    torch.float64: (torch.int64, np.uint64, 52),
}
SUPPORTED = tuple(_LAYOUTS)
Bits = np.ndarray[Any, Any]


def encode(values: torch.Tensor, reference: torch.Tensor) -> list[bytes]:
    """Compress a tensor against a reference.

    Args:
        values: What to compress; any shape, float16, bfloat16, float32 or float64.
        reference: What `decode` will be given again; same shape and dtype.

    Returns:
        One frame per byte of an entry, lowest byte first.
    """
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    return [compressor.compress(plane) for plane in split(values, reference)]


def split(values: torch.Tensor, reference: torch.Tensor) -> list[bytes]:
    """Return the differences of a tensor's bits to a reference's, arranged to be compressed well.

    The bits of a float, as an integer with negative numbers turned over, grow with its value. The difference of two
    such integers counts the floats between them; it is small where the values are close, whatever their size, and
    exists for NaN and infinity too. With the sign in the lowest bit, the differences are ordered by the exponent of
    the reference, so that differences of like size stand together, and cut into bytes.

    Args:
        values: As in `encode`.
        reference: As in `encode`.

    Returns:
        The lowest bytes of all differences, then the next higher ones, and so on.
    """
    difference = _ordered(_bits(values)) - _ordered(_bits(reference))
    width = 8 * difference.itemsize
    folded = (difference << 1) ^ (difference >> (width - 1))
    planes = folded[_order(reference)].view(np.uint8).reshape(-1, folded.itemsize)
    return [planes[:, index].tobytes() for index in range(folded.itemsize)]


def decode(frames: Sequence[bytes], reference: torch.Tensor) -> torch.Tensor:
    """Restore what `encode` was given.

    Args:
        frames: What `encode` returned.
        reference: What `encode` was given, to the bit.

    Returns:
        A new tensor of the reference's shape and dtype.

    Raises:
        AdapterFileError: If the frames are altered, incomplete, or would grow beyond the reference's size.
    """
    _, unsigned, _ = _LAYOUTS[reference.dtype]
    size = reference.numel()
    planes = np.empty((size, np.dtype(unsigned).itemsize), np.uint8)
    if len(frames) != planes.shape[1]:
        raise AdapterFileError(f"there are {len(frames)} frames in place of {planes.shape[1]}.")
    for index, frame in enumerate(frames):
        planes[:, index] = _decompress(frame, size)
    folded = np.empty(size, unsigned)
    folded[_order(reference)] = planes.view(unsigned).reshape(-1)
    one = folded.dtype.type(1)
    difference = ((folded >> one) ^ (~(folded & one) + one)).view(f"i{folded.itemsize}")
    bits = _ordered(_ordered(_bits(reference)) + difference)
    return torch.from_numpy(bits).view(reference.dtype).view(reference.shape)


def _bits(tensor: torch.Tensor) -> Bits:
    signed, _, _ = _LAYOUTS[tensor.dtype]
    bits: Bits = tensor.detach().cpu().contiguous().view(-1).view(signed).numpy()
    return bits


def _ordered(bits: Bits) -> Bits:
    # Its own inverse.
    width = 8 * bits.itemsize
    ordered: Bits = bits ^ ((bits >> (width - 1)) & np.iinfo(bits.dtype).max)
    return ordered


def _order(reference: torch.Tensor) -> Bits:
    """Positions in the order of the exponents, stable; for 8 and 16 bits numpy sorts in linear time."""
    _, unsigned, mantissa = _LAYOUTS[reference.dtype]
    bits = _bits(reference).view(unsigned)
    exponents = (bits << 1) >> (mantissa + 1)
    order: Bits = exponents.astype(np.uint16 if bits.itemsize == 8 else np.uint8).argsort(kind="stable")
    return order


def _decompress(frame: bytes, size: int) -> Bits:
    # What the frame says of its size is checked first: it is what the decompressor goes by.
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if declared != size:
            raise AdapterFileError(f"a frame holds {declared} bytes in place of {size}.")
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise AdapterFileError(f"it cannot be decompressed ({error}).") from error
    if len(data) != size:
        raise AdapterFileError(f"a frame holds {len(data)} bytes in place of {size}.")
    return np.frombuffer(data, np.uint8)
