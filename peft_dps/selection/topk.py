"""Scores, density -> masks with an exact number of selected entries, in linear time.

The scores are non-negative floats, and those sort like their bits read as integers. The k-th best score is therefore
found digit by digit, from the histograms of 16 bits at a time: two passes for fp32, no sort, no copy of contiguous
scores. Histograms add up, so scores on several devices are ranked together, and on several processes
(`sharded_selection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from peft_dps.errors import ConfigError, ScoreError
from peft_dps.tensors.scratch import scratch

DIGIT_BITS = 16
_DIGITS = 1 << DIGIT_BITS
_KEY_DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# Elementwise work in pieces that stay in a CPU's cache is several times faster than one pass with a large temporary.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24


def selected_count(entries: int, density: float) -> int:
    """Return how many of `entries` a subnetwork of this density holds: ceil(entries * density).

    Args:
        entries: Number of entries, at least 0.
        density: Fraction to select, in (0, 1].

    Raises:
        ConfigError: If the density is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"`density` must be in (0, 1], got {density}.")
    return min(entries, math.ceil(entries * density))


def select(scores: torch.Tensor, density: float) -> torch.Tensor:
    """Select the ceil(n * density) best-scored of the n entries of one weight.

    Args:
        scores: Scores of any shape and of fp16, bf16, fp32 or fp64; +inf is allowed and is the best.
        density: Fraction to select, in (0, 1].

    Returns:
        A bool mask of the shape of `scores`, True where selected. Ties are broken by row-major index: the first wins.

    Raises:
        ConfigError: If the density is out of range.
        ScoreError: If a score is NaN or negative, or the dtype is none of these.
    """
    return select_across([scores], density)[0]


def select_across(scores: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
    """Select the ceil(n * density) best-scored of the n entries of several weights together.

    Args:
        scores: Scores of each weight, of any shapes, of one dtype (fp16, bf16, fp32 or fp64), on any devices.
        density: Fraction of all entries to select, in (0, 1].

    Returns:
        One bool mask per weight, True where selected. Ties are broken by the order of the weights, then by row-major
        index: the first wins.

    Raises:
        ConfigError: If the density is out of range.
        ScoreError: If a score is NaN or negative, or the dtypes differ or are none of these.
    """
    dtypes = {tensor.dtype for tensor in scores}
    if len(dtypes) > 1:
        raise ScoreError(f"Scores ranked together must have one dtype, got {', '.join(sorted(map(str, dtypes)))}.")
    keys = [sortable_key(tensor) for tensor in scores]
    count = selected_count(sum(key.numel() for key in keys), density)
    if count == 0:
        return [torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device) for tensor in scores]
    threshold, ties = _find_threshold(keys, count)
    masks = []
    for tensor, key in zip(scores, keys, strict=True):
        mask, ties = mask_above(key, threshold, ties)
        masks.append(mask.view(tensor.shape))
    return masks


def sortable_key(scores: torch.Tensor) -> torch.Tensor:
    """Return the bits of the scores as a flat integer tensor that sorts like the scores."""
    if scores.dtype not in _KEY_DTYPES:
        raise ScoreError(f"Scores must be fp16, bf16, fp32 or fp64, got {scores.dtype}.")
    flat = scores.detach().reshape(-1)
    key = flat.view(_KEY_DTYPES[flat.dtype])
    if key.numel() == 0:
        return key
    lowest, highest = (int(bound) for bound in torch.aminmax(key))
    infinity = int(torch.tensor(math.inf, dtype=flat.dtype).view(key.dtype))
    if lowest >= 0 and highest <= infinity:
        return key
    if torch.isnan(flat).any():
        raise ScoreError(f"{int(torch.isnan(flat).sum())} of {flat.numel()} scores are NaN; no entry can be ranked.")
    if (flat < 0).any():
        raise ScoreError(f"Scores must not be negative, got {float(flat.min())}.")
    return key.clamp(min=0)  # only -0.0 is left, whose bits are a negative integer


def _find_threshold(keys: Sequence[torch.Tensor], count: int) -> tuple[int, int]:
    """Find a threshold such that the `count` largest keys are those above it and the first `ties` equal to it."""
    prefix, remaining, equal = 0, count, 0
    for shift in range(keys[0].element_size() * 8 - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = torch.zeros(_DIGITS, dtype=torch.int64)
        for key in keys:
            histogram += digit_histogram(key, shift, prefix).cpu()
        from_top = histogram.flip(0).cumsum(0)
        position = int(torch.searchsorted(from_top, remaining))
        digit = _DIGITS - 1 - position
        equal = int(histogram[digit])
        remaining -= int(from_top[position]) - equal
        prefix = (prefix << DIGIT_BITS) | digit
    if remaining == equal:  # all of the equal ones are taken: no need to look for the first of them
        return prefix - 1, 0
    return prefix, remaining


def digit_histogram(key: torch.Tensor, shift: int, prefix: int) -> torch.Tensor:
    """Count the 16-bit digits at `shift` of the keys whose higher digits are `prefix`."""
    histogram = torch.zeros(_DIGITS, dtype=torch.int64, device=key.device)
    top_digit = shift + DIGIT_BITS == key.element_size() * 8
    for chunk in _chunks(key):
        if top_digit:
            digits = chunk >> shift
        else:
            digits = (chunk[_compare(torch.eq, chunk >> (shift + DIGIT_BITS), prefix)] >> shift) & (_DIGITS - 1)
        histogram += torch.bincount(digits, minlength=_DIGITS)
    return histogram


def mask_above(key: torch.Tensor, threshold: int, ties: int) -> tuple[torch.Tensor, int]:
    """Select keys above the threshold and the first `ties` equal to it; return how many ties are left to take."""
    mask = torch.empty_like(key, dtype=torch.bool)
    for selected, chunk in zip(_chunks(mask), _chunks(key), strict=True):
        _compare(torch.gt, chunk, threshold, out=selected)
        if ties == 0:
            continue
        equal = _compare(torch.eq, chunk, threshold)
        found = int(equal.count_nonzero())
        if found > ties:
            equal[equal.nonzero().view(-1)[ties:]] = False
            found = ties
        selected |= equal
        ties -= found
    return mask, ties


def _compare(
    comparison: Callable[..., torch.Tensor], chunk: torch.Tensor, value: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Compare integers with a value, by `torch.gt` or another; the result is bool."""
    out = torch.empty_like(chunk, dtype=torch.bool) if out is None else out
    if chunk.device.type == "cpu":  # where torch does not vectorize comparisons whose result is bool
        wide = comparison(chunk, value, out=scratch.empty(chunk.shape, chunk.dtype, "comparison"))
        out.view(torch.int8).copy_(wide)
        return out
    return comparison(chunk, value, out=out)


def _chunks(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(flat.split(_CPU_CHUNK if flat.device.type == "cpu" else _DEVICE_CHUNK))
