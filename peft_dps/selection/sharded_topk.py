"""Masks of an exact size from scores that are cut over processes: the same masks as one process would choose.

The threshold is found as in `selection`, from counts added up over the processes. Each 16-bit digit is found as two
of 8 bits, from the same local histogram: 256 counts are communicated in place of 65,536, for many weights at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from peft_dps.selection.topk import DIGIT_BITS, SortableScores, digit_histogram, mask_above
from peft_dps.tensors.processes import Ranks

WEIGHTS_AT_ONCE = 64  # 32 MiB of local histograms
_HALF = 1 << (DIGIT_BITS // 2)


def select_sharded(
    scores: Sequence[SortableScores], problems: Sequence[Sequence[int]], counts: Sequence[int], ranks: Ranks
) -> tuple[list[torch.Tensor], list[int]]:
    """Select the best-scored entries of weights of which each process holds a part.

    All processes have to call it with the same weights. Ties are broken as on one process: by the order of the
    weights, then by the index in the whole weight.

    Args:
        scores: This process's scores of each weight, possibly none; all of one dtype.
        problems: Which weights are ranked together, by their indices: each in one problem.
        counts: How many entries to select in each problem.
        ranks: The processes.

    Returns:
        One bool mask per weight, True where selected, in the shape of its scores; and how many entries of each whole
        weight are selected.
    """
    keys = [each.bits for each in scores]
    if not keys:
        return [], []
    thresholds, wanted, equal = _find_thresholds([[keys[index] for index in p] for p in problems], counts, ranks)
    tied = [many < all_of_them for many, all_of_them in zip(wanted, equal, strict=True)]
    own_ties = _share_ties(keys, problems, thresholds, wanted, tied, ranks) if any(tied) else [0] * len(keys)
    masks: dict[int, torch.Tensor] = {}
    for problem, threshold, is_tied in zip(problems, thresholds, tied, strict=True):
        for index in problem:
            mask, _ = mask_above(keys[index], threshold if is_tied else threshold - 1, own_ties[index])
            masks[index] = mask.view(scores[index].shape)
    in_order = [masks[index] for index in range(len(keys))]
    if all(len(problem) == 1 for problem in problems):
        many = {problem[0]: count for problem, count in zip(problems, counts, strict=True)}
        return in_order, [many[index] for index in range(len(keys))]
    own = torch.stack([mask.count_nonzero() for mask in in_order])
    return in_order, [int(count) for count in ranks.sum(own).tolist()]


def _find_thresholds(
    problems: list[list[torch.Tensor]], counts: Sequence[int], ranks: Ranks
) -> tuple[list[int], list[int], list[int]]:
    """Find, per problem, its threshold, how many keys equal to it are wanted, and how many there are."""
    device = problems[0][0].device
    remaining = torch.tensor(list(counts), device=device)
    equal, every = torch.zeros_like(remaining), torch.arange(len(problems), device=device)
    prefixes = [0] * len(problems)
    for shift in range(problems[0][0].element_size() * 8 - DIGIT_BITS, -1, -DIGIT_BITS):
        local = torch.zeros(len(problems), _HALF * _HALF, dtype=torch.int64, device=device)
        for histogram, keys, prefix in zip(local, problems, prefixes, strict=True):
            for key in keys:
                histogram += digit_histogram(key, shift, prefix).to(device)
        local = local.view(len(problems), _HALF, _HALF)
        high, remaining, equal = _descend(ranks.sum(local.sum(2)), remaining)
        low, remaining, equal = _descend(ranks.sum(local[every, high]), remaining)
        digits = (high * _HALF + low).tolist()
        prefixes = [(prefix << DIGIT_BITS) | digit for prefix, digit in zip(prefixes, digits, strict=True)]
    return prefixes, remaining.tolist(), equal.tolist()


def _descend(histograms: torch.Tensor, remaining: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find, per row, the bin of the `remaining`-th key from the top, how many are wanted of it and how many it has."""
    from_top = histograms.flip(1).cumsum(1)
    position = (from_top < remaining.unsqueeze(1)).sum(1, keepdim=True)
    bins = histograms.shape[1] - 1 - position
    equal = histograms.gather(1, bins)
    above = from_top.gather(1, position) - equal
    return bins.squeeze(1), remaining - above.squeeze(1), equal.squeeze(1)


def _share_ties(
    keys: list[torch.Tensor],
    problems: Sequence[Sequence[int]],
    thresholds: list[int],
    wanted: list[int],
    tied: list[bool],
    ranks: Ranks,
) -> list[int]:
    """Tell, per weight, how many of this process's keys equal to the threshold are among the first wanted."""
    own = torch.zeros(len(keys), dtype=torch.int64, device=keys[0].device)
    for problem, threshold, is_tied in zip(problems, thresholds, tied, strict=True):
        for index in problem if is_tied else ():
            own[index] = (keys[index] == threshold).count_nonzero()
    found = ranks.gather(own).t().tolist()  # per weight, per process
    shares = [0] * len(keys)
    for problem, many in zip(problems, wanted, strict=True):
        in_order = [count for index in problem for count in found[index]]
        before = list(accumulate(in_order, initial=0))
        size = len(found[problem[0]])
        for place, index in enumerate(problem):
            mine = found[index][ranks.rank]
            shares[index] = max(0, min(many - before[place * size + ranks.rank], mine))
    return shares
