"""A packed tensor: bytes that say themselves what they are, to be unpacked with the pretrained weight at hand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peft_dps.errors import AdapterFileError
from peft_dps.tensors.codec import SUPPORTED, decode, encode

_MAGIC = b"peft_dps packed tensor, version 1\n"
_LENGTH = 4  # bytes that tell the header's length
_MAX_HEADER = 1 << 16
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED}


@dataclass(frozen=True)
class _Header:
    dtype: str  # of the unpacked tensor
    shape: list[int]
    reference: str  # SHA-256 of the pretrained weight's bits in that dtype
    delta: str | None  # dtype in which the difference was rounded; None: nothing was, the bits are coded
    frames: list[int]  # their lengths


def pack(values: torch.Tensor, pretrained: torch.Tensor) -> torch.Tensor:
    """Pack a tensor as the difference of its bits to the pretrained weight's. Lossless.

    Args:
        values: What to pack, of a floating dtype.
        pretrained: The pretrained weight, same shape; taken in the dtype of `values`.

    Returns:
        The bytes, uint8, one axis.
    """
    reference = _reference(pretrained, values.dtype)
    return _assemble(values, reference, None, encode(values, reference))


def pack_delta(delta: torch.Tensor, pretrained: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack a difference to the pretrained weight; what is unpacked is the pretrained weight plus it, in `dtype`.

    Args:
        delta: The difference, of a floating dtype.
        pretrained: The pretrained weight, same shape.
        dtype: Dtype of what is unpacked.

    Returns:
        The bytes, uint8, one axis.
    """
    reference = _reference(pretrained, dtype)
    return _assemble(reference, reference, delta.dtype, encode(delta, torch.zeros_like(delta)))


def add_delta(delta: torch.Tensor, pretrained: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what `unpack` makes of a packed delta."""
    return _reference(pretrained, dtype) + delta.cpu().to(dtype)


def is_packed(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor may be a packed one: no weight that is trained is made of bytes."""
    return tensor.dtype is torch.uint8


def unpack(packed: torch.Tensor, pretrained: torch.Tensor) -> torch.Tensor:
    """Restore a packed tensor.

    Args:
        packed: The bytes.
        pretrained: The pretrained weight against which it was packed; its dtype may be another, if its values in the
            packed tensor's dtype are the same.

    Returns:
        A new tensor on the CPU.

    Raises:
        AdapterFileError: If the bytes are altered or incomplete, or the pretrained weight is another.
    """
    content = packed.detach().cpu().contiguous().numpy().data if packed.dim() == 1 else memoryview(b"")
    header, frames = _disassemble(content)
    if header.shape != list(pretrained.shape):
        raise AdapterFileError(f"its shape is {header.shape}, the model's is {list(pretrained.shape)}.")
    reference = _reference(pretrained, _DTYPES[header.dtype])
    if fingerprint(reference) != header.reference:
        raise AdapterFileError(
            "it is a difference to another pretrained weight than this model's. Load the base model that it was made "
            "against; a layer that is new in each model, such as a head, has to be exported whole."
        )
    if header.delta is None:
        return decode(frames, reference)
    zeros = torch.zeros(header.shape, dtype=_DTYPES[header.delta])
    return add_delta(decode(frames, zeros), pretrained, reference.dtype)


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bits, in hexadecimal digits."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(content).hexdigest()


def _reference(pretrained: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return pretrained.detach().cpu().to(dtype).contiguous()


def _assemble(
    values: torch.Tensor, reference: torch.Tensor, delta: torch.dtype | None, frames: list[bytes]
) -> torch.Tensor:
    header = _Header(
        dtype=str(values.dtype).removeprefix("torch."),
        shape=list(values.shape),
        reference=fingerprint(reference),
        delta=None if delta is None else str(delta).removeprefix("torch."),
        frames=[len(frame) for frame in frames],
    )
    text = json.dumps(asdict(header)).encode()
    content = b"".join([_MAGIC, len(text).to_bytes(_LENGTH, "little"), text, *frames])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _disassemble(content: memoryview) -> tuple[_Header, list[bytes]]:
    start = len(_MAGIC) + _LENGTH
    if bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise AdapterFileError(
            "it is neither a weight nor packed in a way that this version knows. If the file is not altered, a newer "
            "peft_dps may have written it."
        )
    length = int.from_bytes(content[len(_MAGIC) : start], "little")
    if length > min(_MAX_HEADER, len(content) - start):
        raise AdapterFileError("its header is cut short.")
    header = _read_header(bytes(content[start : start + length]))
    if start + length + sum(header.frames) != len(content):
        raise AdapterFileError("it is cut short or has bytes that do not belong to it.")
    frames, position = [], start + length
    for size in header.frames:
        frames.append(bytes(content[position : position + size]))
        position += size
    return header, frames


def _read_header(text: bytes) -> _Header:
    try:
        header = _Header(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError("its header cannot be read.") from error
    names = [header.dtype] if header.delta is None else [header.dtype, header.delta]
    sizes: list[Any] = [header.shape, header.frames]
    if not (all(map(_is_name, names)) and all(map(_are_sizes, sizes))):
        raise AdapterFileError("its header holds values that make no sense.")
    return header


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
