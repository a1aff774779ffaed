"""Masks at work: zero the gradients of frozen entries, and keep the bits of frozen entries whatever an optimizer does.

Floats are handled as the integers of their bits, so that the result is exact for every value, NaN and -0.0 included;
integers wrap around, so that products with 0 and -1 and sums are exact too. One pass that multiplies and adds takes
less time than several of logic.

Everywhere here weights, their copies and their gradients may be of any floating dtype, and have the mask's shape.
"""

from __future__ import annotations

import torch

from peft_dps.masking.mask import INT_DTYPES, Mask
from peft_dps.tensors.scratch import scratch

_CHECKSUM_CHUNK = 1 << 20  # the same on every device: its int64 temporaries are large


@torch.no_grad()
def zero_frozen_(gradient: torch.Tensor, mask: Mask) -> None:
    """Set the frozen entries of a gradient to +0.0 in place, also where they are NaN or infinite."""
    for kept, piece in mask.along(bits_of(gradient)):
        piece.bitwise_and_(kept)


@torch.no_grad()
def hold_frozen(weight: torch.Tensor, mask: Mask, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy the bits of the frozen entries, as integers, 0 elsewhere; into the memory of `out` if given."""
    bits = bits_of(weight)
    held = torch.empty_like(bits) if out is None else bits_of(out)
    for kept, piece, frozen in mask.along(bits, held):
        torch.addcmul(piece, piece, kept, out=frozen)
    return held


@torch.no_grad()
def restore_frozen_(weight: torch.Tensor, mask: Mask, held: torch.Tensor) -> None:
    """Give the frozen entries the bits they had when `hold_frozen` made `held`; the others are left alone."""
    for kept, piece, bits in mask.along(bits_of(weight), held):
        torch.addcmul(bits, piece, kept, value=-1, out=piece)


@torch.no_grad()
def restore_from_snapshot_(weight: torch.Tensor, mask: Mask, snapshot: torch.Tensor) -> None:
    """Give the frozen entries the bits they have in a full copy; the others are left alone."""
    for kept, piece, bits in mask.along(bits_of(weight), bits_of(snapshot)):
        # Apart, so that no interrupt can be between.
        change = torch.sub(piece, bits, out=scratch.like(piece, "change"))
        torch.addcmul(bits, change, kept, value=-1, out=piece)


def checksum(tensor: torch.Tensor, first: int = 0) -> int:
    """Add up the bits of all entries, as `frozen_checksum` does those of frozen ones."""
    nothing_kept = torch.zeros((), dtype=torch.int8, device=tensor.device).expand(tensor.shape)
    return int(frozen_checksum(tensor, nothing_kept, first))


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
    """View a floating tensor as the integers of its bits: the same memory, without gradient."""
    tensor = tensor.detach()
    return tensor.view(INT_DTYPES[tensor.element_size()])
