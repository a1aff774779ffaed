"""What layers other than linear ones compute with effective weights, and their backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from peft_dps.masking.effective_weight import EffectiveWeight, apply_uncast, once_differentiable, passing


def effective_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    effective: EffectiveWeight,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Convolve `x` with W_eff, in the dtype that autocast or else `x` asks for.

    Args:
        x: Activations `[batch, in, *space]`, of 1 to 3 dimensions of space.
        weight: W, `[out, in / groups, *kernel]`.
        bias: `[out]` or None.
        effective: What makes W_eff of W.
        stride: Per dimension of space, as in `torch.nn.functional.conv2d`.
        padding: Zeros on both sides.
        dilation: Distance of the kernel's entries.
        groups: Number of groups.

    Returns:
        Activations `[batch, out, *space]`.
    """
    geometry = (list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)
    return apply_uncast(_EffectiveConv, x, weight, bias, effective, geometry)


def effective_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    effective: EffectiveWeight,
    *,
    padding_index: int,
    scale_grad_by_freq: bool,
) -> torch.Tensor:
    """Look up rows of W_eff. Only those rows are computed.

    Args:
        indices: Integers of any shape.
        weight: W, `[rows, dimensions]`.
        effective: What makes W_eff of W.
        padding_index: Row without gradient; -1 for none.
        scale_grad_by_freq: Divide a row's gradient by how often its index occurs.

    Returns:
        `[*indices.shape, dimensions]` in the weight's dtype.
    """
    output: torch.Tensor = _EffectiveEmbedding.apply(  # type: ignore[no-untyped-call]
        indices, weight, effective, padding_index, scale_grad_by_freq
    )
    return output


class _EffectiveConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        effective: EffectiveWeight,
        geometry: tuple[Any, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.effective, ctx.geometry = effective, geometry
        return torch.convolution(x, passing(effective, weight, x.dtype), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        effective = passing(ctx.effective, weight, x.dtype)
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_output, x, effective, [weight.shape[0]], *ctx.geometry, ctx.needs_input_grad[:3]
        )
        if grad_weight is not None:
            grad_weight = ctx.effective.gradient_(grad_weight.to(weight.dtype))
        return grad_x, grad_weight, grad_bias, None, None


class _EffectiveEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: torch.Tensor,
        weight: torch.Tensor,
        effective: EffectiveWeight,
        padding_index: int,
        scale_grad_by_freq: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.effective, ctx.rows = effective, weight.shape[0]
        ctx.padding_index, ctx.scale_grad_by_freq = padding_index, scale_grad_by_freq
        return effective.at(indices).of(F.embedding(indices, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        gradient = torch.ops.aten.embedding_dense_backward(
            grad_output, indices, ctx.rows, ctx.padding_index, ctx.scale_grad_by_freq
        )
        return None, ctx.effective.gradient_(gradient), None, None, None
