"""What the selected rows or columns of a linear layer add to its output, and their backward passes.

The gradient of the input is added to where the base layer has left its own, so that no second one of its size is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def add_columns(
    base: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    delta: torch.Tensor,
    index: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute base(x) + x[..., index] @ delta^T.

    For the backward pass only x[..., index] is kept.

    Args:
        base: The base layer, linear in `x`. What it returns may be written into.
        x: Activations `[..., in]`.
        delta: D, `[out, k]`.
        index: Columns, `[k]`, int32.
        kept: The same of columns that are not trained any more.

    Returns:
        Activations `[..., out]`, in the dtype that the base layer returns.
    """
    if torch.compiler.is_compiling():
        y = base(x)
        for values, columns in _parts(delta, index, kept):
            y = y + F.linear(x.index_select(-1, columns).to(y.dtype), values.to(y.dtype))
        return y
    x, link = tapped(x)
    output: torch.Tensor = _AddColumns.apply(base(x), x.detach(), delta, index, kept, link)  # type: ignore[no-untyped-call]
    return output


def add_rows(
    base: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    delta: torch.Tensor,
    index: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute base(x), to whose outputs `index` x @ delta^T is added.

    Args:
        base: The base layer, linear in `x`. What it returns may be written into.
        x: Activations `[..., in]`.
        delta: D, `[k, in]`.
        index: Rows, `[k]`, int32.
        kept: The same of rows that are not trained any more.

    Returns:
        Activations `[..., out]`, in the dtype that the base layer returns.
    """
    if torch.compiler.is_compiling():
        y = base(x)
        for values, rows in _parts(delta, index, kept):
            y = y.index_add(-1, rows, F.linear(x.to(y.dtype), values.to(y.dtype)))
        return y
    x, link = tapped(x)
    output: torch.Tensor = _AddRows.apply(base(x), x.detach(), delta, index, kept, link)  # type: ignore[no-untyped-call]
    return output


def _parts(
    delta: torch.Tensor, index: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor] | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(delta, index)] if kept is None else [(delta, index), kept]


class Link:
    """What units have to add to the gradient of an input, until the base layer's part of it has come."""

    def __init__(self) -> None:
        self.add_: Callable[[torch.Tensor], object] | None = None

    def take(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient with what the units add to it, in place where it lies in rows."""
        if self.add_ is None:
            return gradient
        gradient = gradient.contiguous()
        self.add_(gradient.view(-1, gradient.shape[-1]))
        self.add_ = None
        return gradient


def tapped(x: torch.Tensor) -> tuple[torch.Tensor, Link | None]:
    """Return x, and the link to the gradient that it will have; None if it will have none."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, None
    link = Link()
    return _Tap.apply(x, link), link  # type: ignore[no-untyped-call]


class _Tap(torch.autograd.Function):
    """Passes x on. Its backward pass comes after that of the base layer, and of what its output goes into."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, link: Link) -> torch.Tensor:
        ctx.link = link
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.link.take(gradient), None


class _AddColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        delta: torch.Tensor,
        index: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor] | None,
        link: Link | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        taken = _columns(flat, index).to(y.dtype)
        output = writable(y)
        rows = output.view(-1, y.shape[-1])
        rows.addmm_(taken, delta.to(y.dtype).t())
        if kept is not None:
            rows.addmm_(_columns(flat, kept[1]).to(y.dtype), kept[0].to(y.dtype).t())
        ctx.save_for_backward(taken, delta, index)
        ctx.kept, ctx.link = kept, link
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        taken, delta, index = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.link is not None:
            parts = [(rows @ values.to(rows.dtype), columns) for values, columns in _parts(delta, index, ctx.kept)]
            ctx.link.add_ = lambda out: [_add_columns_(out, columns, part) for part, columns in parts]
        own = (rows.t() @ taken).to(delta.dtype) if ctx.needs_input_grad[2] else None
        return gradient, None, own, None, None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        delta: torch.Tensor,
        index: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor] | None,
        link: Link | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(y.dtype)
        output = writable(y)
        for values, rows in _parts(delta, index, kept):
            _add_columns_(output.view(-1, y.shape[-1]), rows, flat @ values.to(y.dtype).t())
        ctx.save_for_backward(x, delta, index)
        ctx.kept, ctx.link = kept, link
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, delta, index = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        taken = _columns(flat, index)
        if ctx.link is not None:
            parts = (
                [(taken, delta)] if ctx.kept is None else [(taken, delta), (_columns(flat, ctx.kept[1]), ctx.kept[0])]
            )
            ctx.link.add_ = lambda out: [out.addmm_(own.to(out.dtype), values.to(out.dtype)) for own, values in parts]
        own = None
        if ctx.needs_input_grad[2]:
            own = (taken.t() @ x.reshape(-1, x.shape[-1]).to(taken.dtype)).to(delta.dtype)
        return gradient, None, own, None, None, None


def writable(y: torch.Tensor) -> torch.Tensor:
    """Return what may be added to in place of y, and be returned."""
    # Neither `y` itself, of which autograd would copy the gradient, nor a view, into which no later module may write.
    return y.detach().contiguous()


def _columns(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return matrix.index_select(1, index)


def _add_columns_(matrix: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # An addition by index goes through the columns one by one on a CPU.
    return matrix.scatter_add_(1, index.long().expand(values.shape), values.to(matrix.dtype))
