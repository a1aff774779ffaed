"""Which weights to train within a number of FLOPs of the backward pass (GreenTrainer, arXiv:2309.13192).

A linear layer with n entries spends as many FLOPs on the gradient of its weight as on that of its input, both
proportional to n. The first is spent if the weight is trained, the second if a weight of an earlier layer is. FLOPs
are told in entries here: a backward pass through everything costs 2 n, added up over all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

RESOLUTION = 1 << 14  # steps that the cost of a whole backward pass is told in


def best_within_flops(
    scores: Sequence[float], sizes: Sequence[Sequence[int]], limit: float, resolution: int = RESOLUTION
) -> list[bool] | None:
    """Choose the units with the highest sum of scores that a backward pass can train within a limit.

    For each unit as the lowest one that is trained the cost of the inputs' gradients is known, and what is left can be
    spent on the units above it. So one table, of the best sum for each cost, to which units are added from the output
    down, answers it for each of them. Costs are rounded up to steps, so that the limit holds; they are exact where
    the sizes of all weights have a common divisor that is large enough.

    Args:
        scores: Score of each unit, not negative, in the order of the forward pass.
        sizes: Per unit, the entries of each weight that it spans, in the same order.
        limit: FLOPs of the backward pass, in entries.
        resolution: Steps to round to.

    Returns:
        Per unit, whether it is chosen; None if the limit is too low for any.
    """
    whole = [sum(each) for each in sizes]
    step = math.gcd(*(size for each in sizes for size in each))
    step = max(step, math.ceil(2 * sum(whole) / resolution))
    table = torch.zeros(max(0, int(limit // step)) + 1, dtype=torch.float64, device="cpu")
    taken: dict[int, torch.Tensor] = {}
    best, lowest, room, above = -1.0, -1, 0, 0
    for index in reversed(range(len(scores))):
        left = limit - whole[index] - (above + whole[index] - sizes[index][0])
        if left >= 0 and (value := scores[index] + float(table[int(left // step)])) > best:
            best, lowest, room = value, index, int(left // step)
        above += whole[index]
        cost = min(math.ceil(whole[index] / step), len(table))
        with_it = table[: len(table) - cost] + scores[index]
        taken[index] = with_it > table[cost:]
        table[cost:] = torch.maximum(with_it, table[cost:])
    if lowest < 0:
        return None
    chosen = [index == lowest for index in range(len(scores))]
    for index in range(lowest + 1, len(scores)):  # the last one that was added is the first to be asked
        cost = math.ceil(whole[index] / step)
        if room >= cost and taken[index][room - cost]:
            chosen[index], room = True, room - cost
    return chosen
