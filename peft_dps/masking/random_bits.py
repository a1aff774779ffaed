"""Random bits by integer arithmetic: the same on every process and device, and nothing of them has to be saved."""

from __future__ import annotations

import random

import torch

_RESOLUTION_BITS = 53
_WORD = 1 << 64
_ODD = 0xD1342543DE82EF95
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0x9E3779B97F4A7C15))


def word(text: str) -> int:
    """Return a 64-bit word that belongs to a text."""
    return _signed(random.Random(f"peft_dps/noise/{text}").getrandbits(64))


def counter(places: torch.Tensor, own: int) -> torch.Tensor:
    """Give each place of a weight, int64, a word of its own; `own` is that of the weight."""
    return places * _signed(_ODD) + own


def takes_part(words: torch.Tensor, probability: float) -> torch.Tensor:
    """Draw a bit of each word: bool, True with a probability."""
    for shift, factor in _MIXING:
        words = (words ^ _shift_right(words, shift)) * _signed(factor)
    return _shift_right(words, 64 - _RESOLUTION_BITS) < int(probability * (1 << _RESOLUTION_BITS))


def _signed(word_: int) -> int:
    return word_ - _WORD if word_ >= _WORD >> 1 else word_


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift without the sign, which torch's shift of int64 would copy."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
