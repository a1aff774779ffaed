"""Masks in bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

# Bits are packed piece by piece: their temporaries are large, and on a CPU have to stay in its cache.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24
# Multiplying eight bytes of 0 or 1 by it gathers them in the highest byte, each at its own place and without a carry.
_GATHER = sum(1 << (56 - 7 * place) for place in range(8))


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into bits, the first entry of each eight into the lowest bit.

    Args:
        mask: Any shape; an entry counts as True unless it is 0.

    Returns:
        uint8, flat, `ceil(n / 8)` bytes.
    """
    flat = mask.reshape(-1)
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=mask.device)
    for piece, bytes_ in _pieces(flat, packed):
        flags = piece if piece.dtype is torch.bool else piece != 0
        if piece.numel() % 8:
            flags = torch.nn.functional.pad(flags, (0, -piece.numel() % 8))
        bytes_.copy_(_gather(flags.contiguous()))
    return packed


def _gather(flags: torch.Tensor) -> torch.Tensor:
    if sys.byteorder == "little" and flags.storage_offset() % 8 == 0:
        return (flags.view(torch.int64) * _GATHER).bitwise_right_shift_(56).bitwise_and_(0xFF)
    places = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return torch.sum(flags.view(-1, 8) << places, 1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo `pack`.

    Args:
        packed: What `pack` returned.
        shape: Shape of the mask.

    Returns:
        A bool mask.
    """
    mask = torch.empty(shape.numel(), dtype=torch.bool, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for piece, bytes_ in _pieces(mask, packed):
        piece.copy_(((bytes_.unsqueeze(1) >> places) & 1).view(-1)[: piece.numel()])
    return mask.view(shape)


def _pieces(flat: torch.Tensor, packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    chunk = _CPU_CHUNK if flat.device.type == "cpu" else _DEVICE_CHUNK
    return zip(flat.split(chunk), packed.split(chunk // 8), strict=True)
