"""Scores, a count -> masks with exactly as many selected entries, in linear time.

The scores are non-negative floats, and those sort like their bits read as integers. The k-th best score is therefore
found digit by digit, from the histograms of 16 bits at a time: two passes for fp32, no sort, no copy of contiguous
scores. Histograms add up, so scores on several devices are ranked together, and on several processes
(`sharded_topk`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from peft_dps.errors import ScoreError
from peft_dps.masking.frozen_bits import bits_of
from peft_dps.tensors.scratch import scratch

DIGIT_BITS = 16
_DIGITS = 1 << DIGIT_BITS
_SORTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elementwise work in pieces that stay in a CPU's cache is several times faster than one pass with a large temporary.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24


@dataclass(frozen=True)
class SortableScores:
    """Scores as integers that sort like them.

    Attributes:
        bits: The bits of the scores, flat.
        shape: Shape of the scores.
        dtype: Their dtype.
        highest: The highest of `bits`; -1 if there are none.
    """

    bits: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    highest: int

    @property
    def values(self) -> torch.Tensor:
        """The scores themselves, flat."""
        return self.bits.view(self.dtype)

    @classmethod
    def of(cls, scores: torch.Tensor) -> SortableScores:
        """Make scores sortable.

        Args:
            scores: Scores of any shape, in fp16, bf16, fp32 or fp64; +inf is allowed and is the best.

        Raises:
            ScoreError: If a score is NaN or negative, or the dtype is none of these.
        """
        if scores.dtype not in _SORTABLE:
            raise ScoreError(f"Scores must be fp16, bf16, fp32 or fp64, got {scores.dtype}.")
        flat = scores.detach().reshape(-1)
        bits = bits_of(flat)
        if bits.numel() == 0:
            return cls(bits, scores.shape, scores.dtype, -1)
        lowest, highest = torch.stack(torch.aminmax(bits)).tolist()
        infinity = int(torch.tensor(math.inf, dtype=flat.dtype, device="cpu").view(bits.dtype))
        if lowest >= 0 and highest <= infinity:
            return cls(bits, scores.shape, scores.dtype, highest)
        if torch.isnan(flat).any():
            many = int(torch.isnan(flat).sum())
            raise ScoreError(f"{many} of {flat.numel()} scores are NaN; no entry can be ranked.")
        if (flat < 0).any():
            raise ScoreError(f"Scores must not be negative, got {float(flat.min())}.")
        # Only -0.0 is left, whose bits are a negative integer.
        return cls(bits.clamp(min=0), scores.shape, scores.dtype, max(highest, 0))


def check_one_dtype(scores: Sequence[SortableScores]) -> None:
    """Check that scores can be ranked together.

    Raises:
        ScoreError: If their dtypes differ.
    """
    dtypes = {each.dtype for each in scores}
    if len(dtypes) > 1:
        raise ScoreError(f"Scores ranked together must have one dtype, got {', '.join(sorted(map(str, dtypes)))}.")


def select(scores: Sequence[SortableScores], count: int) -> list[torch.Tensor]:
    """Select the `count` best-scored entries of one or several weights together.

    Args:
        scores: Scores of each weight, of one dtype, on any devices.
        count: How many to select, at most as many as there are.

    Returns:
        One bool mask per weight, True where selected. Ties are broken by the order of the weights, then by row-major
        index: the first wins.

    Raises:
        ScoreError: If the dtypes differ.
    """
    check_one_dtype(scores)
    if count == 0:
        return [torch.zeros(each.shape, dtype=torch.bool, device=each.bits.device) for each in scores]
    threshold, ties = _find_threshold([each.bits for each in scores], count)
    masks = []
    for each in scores:
        mask, ties = mask_above(each.bits, threshold, ties)
        masks.append(mask.view(each.shape))
    return masks


def select_within(scores: Sequence[SortableScores], costs: Sequence[int], limit: float) -> list[torch.Tensor]:
    """Select the best-scored, from the best on, until what they cost together reaches a limit.

    Args:
        scores: Few scores each, of one dtype, on any devices.
        costs: What one of each costs.
        limit: What is to be reached.

    Returns:
        One bool mask for each, True where selected; ties as in `select`.

    Raises:
        ScoreError: If the dtypes differ.
    """
    check_one_dtype(scores)
    if len(set(costs)) == 1:
        most = sum(each.bits.numel() for each in scores)
        return select(scores, min(most, math.ceil(limit / costs[0])))
    bits = torch.cat([each.bits.cpu() for each in scores])
    cost = torch.cat([torch.full_like(each.bits, one, device="cpu") for each, one in zip(scores, costs, strict=True)])
    order = bits.sort(descending=True, stable=True).indices
    before = cost[order].cumsum(0) - cost[order]  # what the better ones cost
    chosen = torch.zeros(len(bits), dtype=torch.bool, device="cpu")
    chosen[order[before < limit]] = True
    parts = chosen.split([each.bits.numel() for each in scores])
    return [part.view(each.shape).to(each.bits.device) for part, each in zip(parts, scores, strict=True)]


def _find_threshold(keys: Sequence[torch.Tensor], count: int) -> tuple[int, int]:
    """Find a threshold such that the `count` largest keys are those above it and the first `ties` equal to it."""
    prefix, remaining, equal = 0, count, 0
    for shift in range(keys[0].element_size() * 8 - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = torch.zeros(_DIGITS, dtype=torch.int64, device="cpu")
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
