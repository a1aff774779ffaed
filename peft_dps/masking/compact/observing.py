"""Gradients of a whole weight, seen in its layer's backward pass one layer at a time, and thrown away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# The input and the gradient of the output of a layer -> the gradient of its weight, in the weight's layout.
WeightGradient = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# The gradient of a weight -> what to add to the zeros that what is trained gets as gradient: NaN if it is not finite.
Observe = Callable[[torch.Tensor], torch.Tensor | None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def observed(
    y: torch.Tensor,
    x: torch.Tensor,
    weight_gradient: WeightGradient,
    observe: Observe,
    trained: nn.Parameter | None,
) -> torch.Tensor:
    """Return the output of a layer; its backward pass shows the gradient of the weight to `observe`.

    Args:
        y: Output of the layer.
        x: Its input, which is kept for the backward pass.
        weight_gradient: Returns dL/dW of `x` and dL/dy.
        observe: Is given dL/dW.
        trained: What is to have a gradient, since engines wait for one of every parameter; None for none. It is of
            zeros, or NaN where that of the weight is not finite, so that gradient scalers notice it.
    """
    anchor = _anchor(y, trained)
    output: torch.Tensor = _Observed.apply(y, x.detach(), anchor, weight_gradient, observe)  # type: ignore[no-untyped-call]
    return output


def _anchor(like: torch.Tensor, trained: nn.Parameter | None) -> torch.Tensor:
    """Return what makes autograd compute the backward pass of something that trains nothing."""
    is_there = trained is not None and trained.requires_grad  # that of a weight without units may need none
    return trained if trained is not None and is_there else like.new_zeros((), requires_grad=True)


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,
        weight_gradient: WeightGradient,
        observe: Observe,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.zeros = anchor.shape, anchor.dtype
        ctx.weight_gradient, ctx.observe = weight_gradient, observe
        return y.detach()  # no view: a later module may write into it

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            own = _zeros(gradient, ctx.zeros, ctx.observe(ctx.weight_gradient(x, gradient)))
        return gradient, None, own, None, None


def observed_weight(weight: torch.Tensor, observe: Observe, trained: nn.Parameter | None) -> torch.Tensor:
    """Return a weight for a module that reads it; its backward pass shows its gradient to `observe`.

    Args:
        weight: The weight, which needs no gradient of its own.
        observe: Is given dL/dW.
        trained: What is to have a gradient; see `observed`.
    """
    anchor = _anchor(weight, trained)
    output: torch.Tensor = _ObservedWeight.apply(weight, anchor, observe)  # type: ignore[no-untyped-call]
    return output


class _ObservedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, anchor: torch.Tensor, observe: Observe) -> torch.Tensor:
        ctx.observe, ctx.zeros = observe, (anchor.shape, anchor.dtype)
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            own = _zeros(gradient, ctx.zeros, ctx.observe(gradient))
        return gradient, own, None


def _zeros(like: torch.Tensor, kind: tuple[torch.Size, torch.dtype], seen: torch.Tensor | None) -> torch.Tensor:
    zeros = like.new_zeros(kind[0], dtype=kind[1])
    return zeros if seen is None else zeros.add_(seen.to(kind[1]))
