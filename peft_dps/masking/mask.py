"""Masks: which entries of a weight are updated, in bits or in bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from peft_dps.tensors.scratch import scratch

_BYTE = 8
INT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries that are unpacked at once. On a CPU they stay in its cache.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 24
# Multiplying eight bytes of 0 or 1 by it gathers them in the highest byte, each at its own place and without a carry.
_GATHER = sum(1 << (56 - 7 * place) for place in range(_BYTE))


class Mask:
    """Which entries of a weight are updated, in bits or in bytes.

    Bits take an eighth of the memory. On a CPU reading them takes no longer, since it moves less; an accelerator would
    have to write the bytes out first.

    Attributes:
        shape: Shape of the weight.
        stored: The bits, flat, the first entry of each eight in the lowest bit; or the bytes, see `keep`.
        in_bits: Which of the two.
    """

    def __init__(self, shape: torch.Size, stored: torch.Tensor, *, in_bits: bool) -> None:
        self.shape = shape
        self.stored = stored
        self.in_bits = in_bits

    @classmethod
    def of(cls, selected: torch.Tensor, *, in_bits: bool | None = None) -> Mask:
        """Make a mask.

        Args:
            selected: Bool, or int8 where -1 is updated and 0 is not, of the weight's shape. Its memory may be reused.
            in_bits: Whether to keep bits; None to do so on a CPU.
        """
        if selected.device.type == "cpu" if in_bits is None else in_bits:
            return cls(selected.shape, _pack(selected), in_bits=True)
        keep = selected if selected.dtype is torch.int8 else selected.view(torch.int8).neg_()
        return cls(selected.shape, keep, in_bits=False)

    @property
    def keep(self) -> torch.Tensor:
        """The mask in bytes: int8 of the weight's shape, -1 (all bits set) where updated, 0 elsewhere."""
        if not self.in_bits:
            return self.stored
        keep = torch.empty(self.shape, dtype=torch.int8, device=self.device)
        for kept, piece in self.along(keep):
            piece.copy_(kept)
        return keep

    def state(self) -> torch.Tensor:
        """Return the mask row by row, so that it can be cut by rows: uint8, in bits where a row fills whole bytes."""
        rows, row = self.shape[0], self.shape[1:].numel()
        if row % _BYTE:
            return self.keep.view(torch.uint8).clamp(max=1).view(rows, row)
        packed = self.stored if self.in_bits else _pack(self.stored)
        return packed.view(rows, row // _BYTE)

    @staticmethod
    def state_shape(shape: torch.Size) -> tuple[int, int]:
        """Return the shape of what `state` returns for a weight of some shape."""
        row = shape[1:].numel()
        return shape[0], row if row % _BYTE else row // _BYTE

    @classmethod
    def load(cls, state: torch.Tensor, shape: torch.Size) -> Mask:
        """Undo `state`, for a weight of some shape."""
        if shape[1:].numel() % _BYTE:
            return cls.of((state != 0).view(shape))
        mask = cls(shape, state.reshape(-1), in_bits=True)
        return mask if state.device.type == "cpu" else cls(shape, mask.keep, in_bits=False)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.stored.device

    def to(self, device: torch.device) -> Mask:
        """Return the mask on another device."""
        return Mask(self.shape, self.stored.to(device), in_bits=self.in_bits)

    def rows(self, indices: torch.Tensor) -> Mask:
        """Return the mask of those rows of the weight that `indices`, integers of any shape, name."""
        inner = self.shape[1:].numel()
        shape = torch.Size([*indices.shape, *self.shape[1:]])
        if self.in_bits and inner > 0 and inner % _BYTE == 0:
            return Mask(shape, self.stored.view(-1, inner // _BYTE)[indices].view(-1), in_bits=True)
        return Mask(shape, self.keep[indices], in_bits=False)

    def along(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Cut tensors into equal pieces, with the mask of each.

        Args:
            *tensors: Tensors of the weight's shape, on the mask's device.

        Returns:
            Tuples of the mask of a piece, integers that are -1 where updated and 0 elsewhere, valid until the next
            piece is asked for, and the pieces: views of the tensors, flat or as a whole.
        """
        if not all(tensor.is_contiguous() for tensor in tensors):
            return iter([(self.keep, *tensors)])
        return _unpacked(self.stored, tensors) if self.in_bits else _pieces(self.stored, *tensors)


def _unpacked(packed: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    table = _table(INT_DTYPES[tensors[0].element_size()], packed.device)
    chunk = _CPU_CHUNK if packed.device.type == "cpu" else _DEVICE_CHUNK
    cut = (tensor.view(-1).split(chunk) for tensor in tensors)
    for octets, *parts in zip(packed.split(chunk // _BYTE), *cut, strict=True):
        if packed.device.type == "cpu":
            places = scratch.empty(octets.shape, torch.int32, "mask places").copy_(octets)
            kept = scratch.empty((octets.numel(), _BYTE), table.dtype, "mask")
            torch.index_select(table, 0, places, out=kept)
        else:
            kept = table.index_select(0, octets.int())
        yield kept.view(-1)[: parts[0].numel()], *parts


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.view(-1).split(_CPU_CHUNK) for tensor in tensors), strict=True)


_tables: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what each value of a byte unpacks to: `[256, 8]`, -1 for a bit that is set."""
    if (dtype, device) not in _tables:
        octets, places = (torch.arange(size, device=device) for size in (1 << _BYTE, _BYTE))
        _tables[dtype, device] = -((octets.unsqueeze(1) >> places) & 1).to(dtype)
    return _tables[dtype, device]


def _pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask, the first entry of each eight into the lowest bit: uint8, flat, `ceil(n / 8)` bytes."""
    flat = mask.reshape(-1)
    # Piece by piece: the temporaries are large, and on a CPU have to stay in its cache.
    chunk = _CPU_CHUNK // 2 if flat.device.type == "cpu" else _DEVICE_CHUNK
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=mask.device)
    for piece, bytes_ in zip(flat.split(chunk), packed.split(chunk // _BYTE), strict=True):
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
