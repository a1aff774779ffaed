"""What selected rows or columns add to the output of a linear layer that is split over processes.

Every process holds the whole delta D. Of activations no more than the k units of each token are communicated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from peft_dps.masking.compact.delta import Part
from peft_dps.tensors.split import EVERYTHING, Split


def add_split_columns(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], split: Split) -> torch.Tensor:
    """Add x[..., columns] @ delta^T to a process's outputs.

    Args:
        y: What the base layer returns: all outputs, or the process's.
        x: All inputs, or the process's.
        parts: Of columns that are trained, and were: D, `[out, k]`, and which they are, `[k]`.
        split: What the process has of them.
    """
    for delta, index in parts:
        if split.axis == 0:
            taken = split.part(x.index_select(-1, index), -1, EVERYTHING)
            delta = split.part(delta, 0, split.here)
        else:
            slots, columns = split.held(index)
            taken = split.join(x.index_select(-1, columns), -1, slots, len(index))
        y = y + F.linear(taken.to(y.dtype), delta.to(y.dtype))
    return y


def add_split_rows(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], split: Split) -> torch.Tensor:
    """Add x @ delta^T to the outputs `rows`, of which the process may have a part; see `add_split_columns`.

    D is `[k, in]`.
    """
    for delta, rows in parts:
        if split.axis == 0:
            slots, here = split.held(rows)
            own = split.part(F.linear(x.to(y.dtype), delta.to(y.dtype)), -1, slots)
        else:
            part = split.part(delta, 1, split.here)
            own, here = split.join(F.linear(x.to(y.dtype), part.to(y.dtype)), -1, EVERYTHING, len(rows)), rows
        y = y.index_add(-1, here, own.to(y.dtype))
    return y
