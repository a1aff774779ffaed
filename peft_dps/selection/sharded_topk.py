"""Masks of an exact size from scores that are cut over processes: the same masks as one process would choose.

The thresholds are found as in `topk`, from counts that are added up over the processes, for many weights at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from peft_dps.selection.topk import SortableScores, find_thresholds, mask_above
from peft_dps.tensors.shards import Ranks

WEIGHTS_AT_ONCE = 64  # 32 MiB of local histograms


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
    thresholds, wanted, equal = find_thresholds([[keys[index] for index in p] for p in problems], counts, ranks.sum)
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
