"""What a piece of work asks of torch: its operators, and the bytes that these read or write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        name: Its name, without namespace and overload.
        touched: Bytes of the tensors that it read or wrote, each counted once.
        largest: Entries of the largest of them.
    """

    name: str
    touched: int
    largest: int


class Operators(TorchDispatchMode):
    """Lists the operators that are called. Views and memory that is only reserved are no work and left out.

    Attributes:
        calls: The calls, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        if not function.is_view and not name.startswith(("empty", "new_empty")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
            bytes_of = {(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}
            largest = max((tensor.numel() for tensor in tensors), default=0)
            self.calls.append(Call(name, sum(bytes_of.values()), largest))
        return output


def operators_of(work: Callable[[], object]) -> list[Call]:
    """Run something, and return the operators that it called.

    Args:
        work: What to run.
    """
    with Operators() as operators:
        work()
    return operators.calls
