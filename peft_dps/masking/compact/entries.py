"""A linear layer with values added to single entries of its weight; one dense gradient exists at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from peft_dps.masking.compact.delta import Part
from peft_dps.masking.effective_weight import apply_uncast
from peft_dps.tensors.scratch import scratch


def linear_with_entries(
    x: torch.Tensor,
    base_weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: list[Part],
    *,
    input_axis: int,
) -> torch.Tensor:
    """Compute x @ (W0 + D)^T + bias, in the dtype that autocast or else `x` asks for.

    W0 + D is made in the forward and again in the backward pass, in memory that the next layer takes over.

    Args:
        x: Activations `[..., in]`.
        base_weight: W0, `[out, in]`, or `[in, out]` with `input_axis=0`.
        bias: `[out]` or None.
        parts: Values of entries, `[k]`, with their numbers in row-major order, `[k]`; those of the first are trained.
        input_axis: Axis of the weight that holds the input columns.

    Returns:
        Activations `[..., out]`.
    """
    return apply_uncast(_EntryLinear, x, base_weight, bias, parts[0][0], parts, input_axis)


def _passing(base_weight: torch.Tensor, parts: list[Part], dtype: torch.dtype, input_axis: int) -> torch.Tensor:
    """Return W0 + D as `[out, in]`, in memory that the next call may overwrite."""
    if base_weight.device.type == "cpu" and not torch.compiler.is_compiling():
        made = scratch.empty(base_weight.shape, dtype, "weight").copy_(base_weight)
    else:
        made = base_weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    flat = made.view(-1)
    for values, numbers in parts:
        flat.index_add_(0, numbers, values.detach().to(dtype))
    return made if input_axis == 1 else made.t()


class _EntryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base_weight: torch.Tensor,
        bias: torch.Tensor | None,
        values: torch.Tensor,
        parts: list[Part],
        input_axis: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, base_weight, values)
        ctx.parts, ctx.input_axis = parts, input_axis
        return F.linear(x, _passing(base_weight, parts, x.dtype, input_axis), bias).detach()  # no view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, base_weight, values = ctx.saved_tensors
        rows, columns = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ _passing(base_weight, ctx.parts, x.dtype, ctx.input_axis)).view(x.shape)
        if ctx.needs_input_grad[3]:
            dense = torch.mm(*((rows.t(), columns) if ctx.input_axis == 1 else (columns.t(), rows)))
            grad_values = dense.view(-1).index_select(0, ctx.parts[0][1]).to(values.dtype)
        return grad_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None, grad_values, None, None
