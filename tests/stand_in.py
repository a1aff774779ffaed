"""A stand-in for an accelerator: tensors that say that they are on one, and what a program waits for it.

What they hold lies on the CPU and is computed there, so that the code for accelerators runs on any machine.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

PLACE = torch.device("ipu", 0)  # of which torch knows no more than the name
# Operators whose result, or its shape, the host has to have before it can go on.
_ASKED = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2", "is_nonzero",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Placed(torch.Tensor):
    """A tensor that says that it is on the accelerator; `held` is what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Placed:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="meta", requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PLACE

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: Placed) -> None:
        torch._C.TensorBase.data.__set__(self, other)
        self.held = other.held

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Placed({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with StandIn() as mode:
            return mode.__torch_dispatch__(function, types, args, kwargs)


class StandIn(TorchDispatchMode):
    """Lets tensors be made on the stand-in and moved there and back.

    Attributes:
        waits: How often the host had to wait, by place in the code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, leaves = function.__name__.partition(".")[0], tree_flatten((args, kwargs))[0]
        placed, is_copy = any(isinstance(each, Placed) for each in leaves), name in ("_to_copy", "copy_")
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        to_place = placed if asked is None else torch.device(asked).type in (PLACE.type, "meta")
        crosses = is_copy and (
            to_place != placed if name == "_to_copy" else isinstance(args[0], Placed) != isinstance(args[1], Placed)
        )
        if (placed and self._asks(name, args)) or crosses:
            self._note(name)
        if placed and not is_copy and not name.startswith("_foreach"):  # which take a list by device
            self._refuse_to_mix(name, leaves)
        made = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not to_place:
            return made
        made = tree_map(lambda each: Placed(each) if isinstance(each, torch.Tensor) else each, made)
        return return_and_correct_aliasing(function, args, kwargs, made) if placed else made

    @staticmethod
    def _asks(name: str, args: Any) -> bool:
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return name in _ASKED
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])

    @staticmethod
    def _refuse_to_mix(name: str, leaves: list[Any]) -> None:
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Placed)]
        if any(leaf.dim() and not name.startswith("index") for leaf in others):  # scalars and indices may be elsewhere
            raise RuntimeError(f"{name} was given tensors on {PLACE} and on the CPU.")

    def _note(self, name: str) -> None:
        frames = [each for each in traceback.extract_stack() if "/peft_dps/" in each.filename]
        own = frames[-1] if frames else None
        where = "elsewhere" if own is None else f"{own.filename.rpartition('/peft_dps/')[2]}:{own.lineno}"
        self.waits[f"{name} at {where}"] += 1


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Placed) else leaf


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Have a stand-in for an accelerator, `PLACE`."""
    with torch.autograd.set_multithreading_enabled(False), StandIn() as mode:
        yield mode
