"""Masks in bits."""

from __future__ import annotations

import torch

_CHUNK = 1 << 20  # bits are packed piece by piece: their temporaries are large


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into bits, the first entry of each eight into the lowest bit.

    Args:
        mask: Any shape; an entry counts as True unless it is 0.

    Returns:
        uint8, flat, `ceil(n / 8)` bytes.
    """
    flat = mask.reshape(-1)
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=mask.device)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    for piece, bytes_ in zip(flat.split(_CHUNK), packed.split(_CHUNK // 8), strict=True):
        bits = torch.zeros(bytes_.numel() * 8, dtype=torch.uint8, device=mask.device)
        bits[: piece.numel()] = piece != 0
        torch.sum(bits.view(-1, 8) << places, 1, dtype=torch.uint8, out=bytes_)
    return packed


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
    for piece, bytes_ in zip(mask.split(_CHUNK), packed.split(_CHUNK // 8), strict=True):
        piece.copy_(((bytes_.unsqueeze(1) >> places) & 1).view(-1)[: piece.numel()])
    return mask.view(shape)
