"""Effective weights of methods with noise: what a training forward multiplies with in place of the weight itself.

They are computed anew in the backward pass, so that no second copy of a weight lives from forward to backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from peft_dps.errors import EngineError
from peft_dps.masking.frozen_bits import zero_frozen_
from peft_dps.masking.mask import Mask
from peft_dps.tensors.scratch import scratch
from peft_dps.tensors.shards import Sharding


class EffectiveWeight(Protocol):
    """A weight as a training forward sees it."""

    def of(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the effective weight in the weight's shape and dtype, in `out` if given, else as a new tensor."""

    def at(self, rows: torch.Tensor) -> EffectiveWeight:
        """Return the same for the rows of the weight that these indices name, an embedding's."""

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Turn the gradient of the effective weight into that of the weight, in place."""

    def active_columns(self) -> torch.Tensor | None:
        """Return the input columns whose gradient is not zero, by index; None for all, or where it does not pay."""
        return None


@dataclass(frozen=True)
class NoisyWeight(EffectiveWeight):
    """ACCUMULATE: W_eff = W0 + b * (W - W0) / density, whose mean over b is W; dL/dW = dL/dW_eff * b.

    Attributes:
        base_weight: W0, perhaps on another device.
        columns: b, 0 or 1 per input column, shaped to broadcast over the weight, in the weight's dtype.
        density: Probability of b = 1.
    """

    base_weight: torch.Tensor
    columns: torch.Tensor
    density: float

    def of(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W_eff in the weight's shape and dtype, in `out` if given, else as a new tensor."""
        base, share = self.base_weight.to(weight.device, weight.dtype), self.columns / self.density
        return torch.lerp(base, weight.detach(), share, out=out)

    def at(self, rows: torch.Tensor) -> NoisyWeight:
        """Return the same for some rows of the weight, which all have the same columns."""
        return NoisyWeight(self.base_weight[rows.to(self.base_weight.device)], self.columns, self.density)

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply the gradient of W_eff by b, in place; where b = 0 it is zero, also if it was infinite or NaN."""
        return gradient.masked_fill_(self.columns == 0, 0.0)

    def active_columns(self) -> torch.Tensor | None:
        """Return the columns where b = 1. An accelerator would have to wait for their number: None there."""
        if self.columns.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return self.columns.view(-1).nonzero().view(-1)


@dataclass(frozen=True)
class AmplifiedWeight(EffectiveWeight):
    """SUBNETWORK: W_eff = T + M * (W - T) / density; dL/dW = dL/dW_eff * M.

    Attributes:
        snapshot: T, the weight when the stage began.
        density: Density of the subnetwork.
        mask: M. None where frozen entries of W equal T: then the formula holds without it, and the gradient is
            masked once, at the optimizer step.
    """

    snapshot: torch.Tensor
    density: float
    mask: Mask | None = None

    def of(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W_eff in the weight's shape and dtype, in `out` if given, else as a new tensor."""
        weight, scale = weight.detach(), 1.0 / self.density
        effective = torch.empty_like(weight) if out is None else out
        if self.mask is None:
            return torch.lerp(self.snapshot, weight, scale, out=effective)
        for kept, now, before, piece in self.mask.along(weight, self.snapshot, effective):
            torch.lerp(before, now, kept.to(piece.dtype).mul_(-scale), out=piece)
        return effective

    def at(self, rows: torch.Tensor) -> AmplifiedWeight:
        """Return the same for some rows of the weight."""
        mask = None if self.mask is None else self.mask.rows(rows)
        return AmplifiedWeight(self.snapshot[rows], self.density, mask)

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Zero the gradient of frozen entries, in place."""
        if self.mask is not None:
            zero_frozen_(gradient, self.mask)
        return gradient


@dataclass(frozen=True)
class ShardedAmplifiedWeight(EffectiveWeight):
    """SUBNETWORK: W_eff = T + M * (W - T) / density; dL/dW = dL/dW_eff * M.

    Each process computes its rows of W_eff, and all collect them: once in the forward and once in the backward pass.
    Nothing of the whole weight's size stays from one to the other.

    Attributes:
        weight: This process's rows of W.
        snapshot: Its rows of T, the weight when the stage began.
        mask: Its rows of M.
        density: Density of the subnetwork.
        sharding: How the weight is cut.
        masks_gradient: Whether the gradient is masked in the backward pass, for which the mask is collected too.
        rows: Indices of the rows that the forward uses, an embedding's; None for all.
    """

    weight: torch.Tensor
    snapshot: torch.Tensor
    mask: Mask
    density: float
    sharding: Sharding
    masks_gradient: bool
    rows: torch.Tensor | None = None

    def of(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W_eff in the dtype of `weight`, as a new tensor; all processes have to call it."""
        own = AmplifiedWeight(self.snapshot, self.density, self.mask).of(self.weight)
        whole = self.sharding.whole_of(own.to(weight.device, weight.dtype))
        return whole if self.rows is None else whole[self.rows]

    def at(self, rows: torch.Tensor) -> ShardedAmplifiedWeight:
        """Return the same for some rows of the weight."""
        return replace(self, rows=rows)

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Zero the gradient of frozen entries, in place; all processes have to call it."""
        if self.masks_gradient:
            keep = self.sharding.whole_of(self.mask.keep.to(gradient.device))
            zero_frozen_(gradient, Mask.of(keep if self.rows is None else keep[self.rows], in_bits=False))
        return gradient


def materialize(weight: torch.Tensor, effective: EffectiveWeight) -> torch.Tensor:
    """Return W_eff as a tensor that passes its gradient on to the weight, for modules that read weights."""
    output: torch.Tensor = _Materialize.apply(weight, effective)  # type: ignore[no-untyped-call]
    return output


def once_differentiable(backward: Callable[..., tuple[torch.Tensor | None, ...]]) -> Any:
    """Let a backward pass be differentiated no further: whoever does is told so."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            made = backward(ctx, gradient)
        if not (torch.is_grad_enabled() and gradient.requires_grad):
            return made
        return tuple(None if each is None else _NoFurther.apply(each, gradient) for each in made)  # type: ignore[no-untyped-call]

    return wrapped


class _NoFurther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, _depends_on: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise EngineError(
            "A method with noise (DPS Mix, Mixout) has no second derivative, which a gradient penalty "
            "(`create_graph=True`) asks for. Use one without, such as `variant='dense'`."
        )


def refuse_transforms() -> None:
    """Refuse to compute an effective weight under `torch.func`."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise EngineError(
            "A method with noise (DPS Mix, Mixout) cannot train under `torch.func` (grad, vmap, jvp, ...), which sees "
            "no effective weights. Use `loss.backward()`, or `variant='dense'`."
        )


class _Materialize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, effective: EffectiveWeight) -> torch.Tensor:
        ctx.effective = effective
        return effective.of(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.effective.gradient_(gradient.clone()), None


def apply_uncast(
    function: type[torch.autograd.Function],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *settings: Any,
) -> torch.Tensor:
    """Apply a function in the dtype that autocast or else `x` asks for; inside of it autocast is off."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        output: torch.Tensor = function.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype), *settings)
    return output


def passing(effective: EffectiveWeight, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return W_eff in memory that the next call may overwrite."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or torch.compiler.is_compiling():
        return effective.of(weight).to(dtype)
    made = effective.of(weight, scratch.empty(weight.shape, weight.dtype, "weight"))
    return made if made.dtype == dtype else scratch.empty(weight.shape, dtype, "cast").copy_(made)
