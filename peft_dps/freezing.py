"""Masks at work: zero the gradients of frozen entries, and keep the bits of frozen entries whatever an optimizer does.

Floats are handled as the integers of their bits, so that the result is exact for every value, NaN and -0.0 included.
A mask in use is a `keep` tensor: int8, -1 (all bits set) where the entry is updated and 0 where it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_INT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Work in pieces that stay in a CPU's cache: the int8 mask is widened piece by piece.
_CPU_CHUNK = 1 << 18
_CHECKSUM_CHUNK = 1 << 20  # the same on every device: its int64 temporaries are large


def keep_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Turn a bool mask, True = updated, into the int8 form that the functions below take.

    Args:
        mask: Bool tensor of the weight's shape. Its memory is reused.
    """
    return mask.view(torch.int8).neg_()


@torch.no_grad()
def zero_frozen_(gradient: torch.Tensor, keep: torch.Tensor) -> None:
    """Set the frozen entries of a gradient to +0.0 in place, also where they are NaN or infinite.

    Args:
        gradient: Any floating dtype.
        keep: int8, same shape.
    """
    for piece, kept in pieces(bits_of(gradient), keep):
        piece.bitwise_and_(kept)


@torch.no_grad()
def hold_frozen(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Copy the bits of the frozen entries.

    Args:
        weight: Any floating dtype.
        keep: int8, same shape.

    Returns:
        An integer tensor of the weight's shape and size: the bits of frozen entries, 0 elsewhere.
    """
    bits = bits_of(weight)
    held = torch.empty_like(bits)
    for piece, kept, frozen in pieces(bits, keep, held):
        torch.bitwise_and(piece, ~kept, out=frozen)
    return held


@torch.no_grad()
def restore_frozen_(weight: torch.Tensor, keep: torch.Tensor, held: torch.Tensor) -> None:
    """Give the frozen entries the bits they had when `held` was made; the others are left alone.

    Args:
        weight: Any floating dtype.
        keep: int8, same shape.
        held: What `hold_frozen` returned.
    """
    for piece, kept, bits in pieces(bits_of(weight), keep, held):
        piece.bitwise_and_(kept).bitwise_or_(bits)


@torch.no_grad()
def restore_from_snapshot_(weight: torch.Tensor, keep: torch.Tensor, snapshot: torch.Tensor) -> None:
    """Give the frozen entries the bits they have in a full copy; the others are left alone.

    Args:
        weight: Any floating dtype.
        keep: int8, same shape.
        snapshot: A copy of the weight, same shape and dtype.
    """
    for piece, kept, bits in pieces(bits_of(weight), keep, bits_of(snapshot)):
        changes = (piece ^ bits).bitwise_and_(kept)
        torch.bitwise_xor(bits, changes, out=piece)


@torch.no_grad()
def frozen_checksum(weight: torch.Tensor, keep: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Add up the bits of the frozen entries, each weighted by its place, modulo 2**64.

    It tells whether frozen entries moved where no copy of them is kept: surely if one did, and almost surely if
    several did, since their changes would have to cancel out.

    Args:
        weight: Any floating dtype.
        keep: int8, same shape.
        first: Place of the first entry in the whole weight. The checksums of all parts add up to that of the whole.

    Returns:
        An int64 scalar on the weight's device.
    """
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    start = 3 + 2 * first
    bits, kept = bits_of(weight).reshape(-1), keep.reshape(-1)  # row-major, so that the value depends on no layout
    for piece, piece_kept in zip(bits.split(_CHECKSUM_CHUNK), kept.split(_CHECKSUM_CHUNK), strict=True):
        frozen = piece.bitwise_and(~piece_kept)
        end = start + 2 * frozen.numel()
        total += (frozen * torch.arange(start, end, 2, device=frozen.device)).sum()
        start = end
    return total


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """View a floating tensor as the integers of its bits.

    Args:
        tensor: Any floating dtype.

    Returns:
        An integer view of the same memory, without gradient.
    """
    tensor = tensor.detach()
    return tensor.view(_INT_DTYPES[tensor.element_size()])


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut equally shaped tensors into the same flat pieces where their memory allows it, else pass them whole.

    Args:
        *tensors: Tensors of one shape on one device.

    Returns:
        Tuples of pieces, views of the tensors.
    """
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.view(-1).split(_CPU_CHUNK) for tensor in tensors), strict=True)
