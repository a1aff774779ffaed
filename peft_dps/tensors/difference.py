"""A tensor as the difference of its bits to a pretrained weight's: compressed bytes, and back to the bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import zstandard

from peft_dps.errors import AdapterFileError

_MAGIC = b"peft_dps difference, version 1\n"
_LENGTH = 4  # bytes that tell the header's length
_MAX_HEADER = 1 << 16
# Higher levels look for repetitions, of which there are none: they are slower and no smaller.
_LEVEL = 1
# Per floating dtype: the integers of its size, and the bits of its mantissa.
_LAYOUTS = {
    torch.float16: (torch.int16, np.uint16, 10),
    torch.bfloat16: (torch.int16, np.uint16, 7),
    torch.float32: (torch.int32, np.uint32, 23),
    torch.float64: (torch.int64, np.uint64, 52),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _LAYOUTS}
Bits = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Header:
    dtype: str  # of the tensor
    shape: list[int]
    pretrained: str  # SHA-256 of the pretrained weight's bits in that dtype
    frames: list[int]  # their lengths

    def __post_init__(self) -> None:
        sizes = [*self.shape, *self.frames]
        if self.dtype not in DTYPES or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("values that make no sense")


def encode(values: torch.Tensor, pretrained: torch.Tensor) -> torch.Tensor:
    """Compress a tensor against a pretrained weight, without loss.

    Args:
        values: What to compress; any shape, one of `DTYPES`.
        pretrained: The pretrained weight, same shape; taken in the dtype of `values`.

    Returns:
        Bytes that say what they are, uint8, one axis.
    """
    reference = pretrained.detach().cpu().to(values.dtype)
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    frames = [compressor.compress(plane) for plane in byte_planes(values, reference)]
    name = str(values.dtype).removeprefix("torch.")
    header = _Header(name, list(values.shape), _fingerprint(reference), [len(frame) for frame in frames])
    text = json.dumps(asdict(header)).encode()
    content = b"".join([_MAGIC, len(text).to_bytes(_LENGTH, "little"), text, *frames])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def is_encoded(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor may be what `encode` returns: no weight that is trained is made of bytes."""
    return tensor.dtype is torch.uint8


def decode(encoded: torch.Tensor, pretrained: torch.Tensor) -> torch.Tensor:
    """Restore what `encode` was given.

    Args:
        encoded: What `encode` returned.
        pretrained: The pretrained weight against which it was encoded; its dtype may be another, if its values in the
            encoded tensor's dtype are the same.

    Returns:
        A new tensor on the CPU.

    Raises:
        AdapterFileError: If the bytes are altered or incomplete, would grow beyond the pretrained weight's size, or
            belong to another pretrained weight.
    """
    header, frames = _take_apart(encoded)
    if header.shape != list(pretrained.shape):
        raise AdapterFileError(f"its shape is {header.shape}, the model's is {list(pretrained.shape)}.")
    reference = pretrained.detach().cpu().to(DTYPES[header.dtype])
    if _fingerprint(reference) != header.pretrained:
        raise AdapterFileError(
            "it is a difference to another pretrained weight than this model's. Load the base model that it was made "
            "against; a layer that is new in each model, such as a head, has to be exported whole."
        )
    if len(frames) != reference.itemsize:
        raise AdapterFileError(f"it has {len(frames)} bytes for an entry of {reference.itemsize}.")
    planes = np.stack([_decompress(frame, reference.numel()) for frame in frames], axis=1)
    folded = np.empty(reference.numel(), _LAYOUTS[reference.dtype][1])
    folded[_exponent_order(reference)] = planes.view(folded.dtype).reshape(-1)
    one = folded.dtype.type(1)
    difference = ((folded >> one) ^ (~(folded & one) + one)).view(f"i{folded.itemsize}")
    bits = _ordered(_ordered(_bits(reference)) + difference)
    return torch.from_numpy(bits).view(reference.dtype).view(reference.shape)


def byte_planes(values: torch.Tensor, reference: torch.Tensor) -> list[bytes]:
    """Return the differences of a tensor's bits to a reference's, arranged to be compressed well.

    The bits of a float, as an integer with negative numbers turned over, grow with its value. The difference of two
    such integers counts the floats between them; it is small where the values are close, whatever their size, and
    exists for NaN and infinity too. With the sign in the lowest bit, the differences are ordered by the exponent of
    the reference, so that differences of like size stand together, and cut into bytes: the lowest ones of all, then
    the next higher ones, and so on.
    """
    difference = _ordered(_bits(values)) - _ordered(_bits(reference))
    width = 8 * difference.itemsize
    folded = (difference << 1) ^ (difference >> (width - 1))
    planes = folded[_exponent_order(reference)].view(np.uint8).reshape(-1, folded.itemsize)
    return [planes[:, index].tobytes() for index in range(folded.itemsize)]


def _bits(tensor: torch.Tensor) -> Bits:
    signed, _, _ = _LAYOUTS[tensor.dtype]
    bits: Bits = tensor.detach().cpu().contiguous().view(-1).view(signed).numpy()
    return bits


def _ordered(bits: Bits) -> Bits:
    # Its own inverse.
    width = 8 * bits.itemsize
    ordered: Bits = bits ^ ((bits >> (width - 1)) & np.iinfo(bits.dtype).max)
    return ordered


def _exponent_order(reference: torch.Tensor) -> Bits:
    """Positions in the order of the exponents, stable; for 8 and 16 bits numpy sorts in linear time."""
    _, unsigned, mantissa = _LAYOUTS[reference.dtype]
    bits = _bits(reference).view(unsigned)
    exponents = (bits << 1) >> (mantissa + 1)
    order: Bits = exponents.astype(np.uint16 if bits.itemsize == 8 else np.uint8).argsort(kind="stable")
    return order


def _fingerprint(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_bits(tensor).data).hexdigest()


def _take_apart(encoded: torch.Tensor) -> tuple[_Header, list[memoryview]]:
    content = encoded.detach().cpu().contiguous().numpy().data if encoded.dim() == 1 else memoryview(b"")
    start = len(_MAGIC) + _LENGTH
    if bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise AdapterFileError(
            "it is neither a weight nor a difference of a form that this version knows. If the file is not altered, a "
            "newer peft_dps may have written it."
        )
    end = start + int.from_bytes(content[len(_MAGIC) : start], "little")
    if end > min(start + _MAX_HEADER, len(content)):
        raise AdapterFileError("its header is cut short.")
    try:
        header = _Header(**json.loads(bytes(content[start:end])))
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError("its header cannot be read.") from error
    if end + sum(header.frames) != len(content):
        raise AdapterFileError("it is cut short or has bytes that do not belong to it.")
    ends = accumulate(header.frames, initial=end)
    return header, [content[left:right] for left, right in pairwise(ends)]


def _decompress(frame: bytes | memoryview, size: int) -> Bits:
    # What the frame says of its size is checked first: it is what the decompressor goes by.
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if declared != size:
            raise AdapterFileError(f"a frame holds {declared} bytes in place of {size}.")
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise AdapterFileError(f"it cannot be decompressed ({error}).") from error
    return np.frombuffer(data, np.uint8)
