"""What a process communicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Counts the bytes of the tensors that are handed to collectives.

    Attributes:
        sent: Per call, its name and the bytes of its tensors, those to be filled included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.sent.append((function.__name__, sum(tensor.nbytes for tensor in tensors)))
        return function(*args, **(kwargs or {}))


def traffic_of(work: Callable[[], object]) -> dict[str, int]:
    """Run something, and return the bytes that it communicated, by the name of the collective.

    Args:
        work: What to run.
    """
    with Collectives() as collectives:
        work()
    sums: dict[str, int] = {}
    for name, size in collectives.sent:
        name = name.partition(".")[0].strip("_")
        sums[name] = sums.get(name, 0) + size
    return sums
