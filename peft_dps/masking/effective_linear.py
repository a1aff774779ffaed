"""What a linear layer computes with an effective weight, and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from peft_dps.masking.effective_weight import EffectiveWeight, apply_uncast, once_differentiable, passing
from peft_dps.tensors.scratch import scratch

_COLUMNS_TOGETHER = 32


def effective_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    effective: EffectiveWeight,
    *,
    input_axis: int,
) -> torch.Tensor:
    """Compute x @ W_eff^T + bias, in the dtype that autocast or else `x` asks for.

    Args:
        x: Activations `[..., in]`.
        weight: W, `[out, in]`, or `[in, out]` with `input_axis=0`.
        bias: `[out]` or None.
        effective: What makes W_eff of W.
        input_axis: Axis of `weight` that holds the input columns.

    Returns:
        Activations `[..., out]`.
    """
    return apply_uncast(_EffectiveLinear, x, weight, bias, effective, input_axis)


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        effective: EffectiveWeight,
        input_axis: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.effective, ctx.input_axis = effective, input_axis
        output = F.linear(x, _out_in(passing(effective, weight, x.dtype), input_axis), bias)
        return output.detach()  # no view: a later module may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[0]:
            effective = _out_in(passing(ctx.effective, weight, x.dtype), ctx.input_axis)
            grad_x = (rows @ effective).view(x.shape)
            del effective
        if ctx.needs_input_grad[1]:
            columns = x.reshape(-1, x.shape[-1])
            grad_weight = _weight_gradient(rows, columns, ctx.effective, ctx.input_axis, weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


def _weight_gradient(
    rows: torch.Tensor, columns: torch.Tensor, effective: EffectiveWeight, input_axis: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the gradient of the weight from those of the outputs, `[tokens, out]`, and the inputs, `[tokens, in]`."""
    active = effective.active_columns()
    if active is None:
        return effective.gradient_((rows.t() @ columns if input_axis == 1 else columns.t() @ rows).to(dtype))
    # Columns without a gradient are left out of the product and read from a column of zeros behind it.
    inputs, count = columns.shape[-1], active.numel()
    width = _rounded_up(count + 1, inputs + 1)
    taken = scratch.empty((columns.shape[0], width), columns.dtype, "columns")
    torch.index_select(columns, 1, F.pad(active, (0, width - count)), out=taken)
    place = torch.full((inputs,), count, device=active.device)
    place[active] = torch.arange(count, device=active.device)
    outputs = rows.shape[-1]
    shape = (outputs, width) if input_axis == 1 else (width, outputs)
    product = scratch.empty(shape, rows.dtype, "weight")  # W_eff has been used by now
    torch.mm(*((rows.t(), taken) if input_axis == 1 else (taken.t(), rows)), out=product)
    product.select(input_axis, count).zero_()
    if dtype == product.dtype:
        return product.index_select(input_axis, place)
    whole = scratch.empty((outputs, inputs) if input_axis == 1 else (inputs, outputs), product.dtype, "cast")
    return torch.index_select(product, input_axis, place, out=whole).to(dtype)


def _rounded_up(columns: int, most: int) -> int:
    """Round to one of few widths: oneDNN compiles a kernel for each shape and keeps a thousand of them in memory."""
    return min(-(-columns // _COLUMNS_TOGETHER) * _COLUMNS_TOGETHER, most)


def _out_in(weight: torch.Tensor, input_axis: int) -> torch.Tensor:
    return weight if input_axis == 1 else weight.t()
