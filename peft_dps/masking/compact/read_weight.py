"""A weight for modules that read it instead of calling the layer, made only once something is computed with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

_FORM = {
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.is_floating_point}


def made_when_used(make: Callable[[], torch.Tensor], like: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Return what `make` returns, which is called only when more than the form of the tensor is asked for.

    Some models look at the dtype of a weight in each forward, as T5 does. Until it is made the tensor has no memory.

    Args:
        make: Makes it.
        like: A tensor of its shape, dtype and device.
        trained: The parameter that it depends on.
    """
    empty: torch.Tensor = _Empty.apply(like, trained, make)  # type: ignore[no-untyped-call]
    weight = empty.as_subclass(_ReadWeight)
    weight.make = make
    return weight


class _ReadWeight(torch.Tensor):
    make: Callable[[], torch.Tensor] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _FORM:
                for each in tree_leaves((args, kwargs)):
                    if isinstance(each, _ReadWeight):
                        _fill(each)
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def _fill(weight: _ReadWeight) -> None:
    make, weight.make = weight.make, None
    if make is not None:
        weight.untyped_storage().resize_(weight.numel() * weight.element_size())
        weight.detach().copy_(make())


class _Empty(torch.autograd.Function):
    """Its backward pass is that of what `make` returns, made once more."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, trained: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.trained, ctx.make = trained, make
        empty = torch.empty_like(like, memory_format=torch.contiguous_format)
        empty.untyped_storage().resize_(0)
        return empty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        with torch.enable_grad():
            weight = ctx.make()
        return None, torch.autograd.grad(weight, ctx.trained, gradient)[0], None
