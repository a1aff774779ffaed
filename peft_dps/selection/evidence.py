"""Evidence: what is gathered of the gradients of a phase, for the scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from peft_dps.errors import ConfigError
from peft_dps.tensors.processes import Ranks, distinct
from peft_dps.tensors.registry import Registry
from peft_dps.tensors.saved_state import SavedState, State

SCORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by what `DPSConfig.score_dtype` calls them
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 24


class ObservedWeight(Protocol):
    """A weight whose gradient is about to be applied."""

    name: str
    gathered: Gathered

    @property
    def weight(self) -> torch.Tensor:
        """The weight, or this process's rows of it."""

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as optimizers hold it."""

    @property
    def gradient(self) -> torch.Tensor:
        """Its gradient, or this process's rows of it."""

    @property
    def ranks(self) -> Ranks | None:
        """The processes that it is cut over."""

    def take_memory(self, dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the weight's shape."""


class Gathered:
    """What is gathered of one weight without evidence: nothing."""

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return True

    def settled(self, weight: ObservedWeight) -> Gathered:
        """Return the same without need of an optimizer, which a copy of the training may not have."""
        return self

    def value(self, weight: ObservedWeight) -> torch.Tensor | None:
        """Return the evidence, of the weight's shape and on its device; None where there is none to have."""
        return None

    def after_step(self, weight: ObservedWeight, optimizer: Optimizer) -> None:
        """Take note that an optimizer which has the weight has made a step, with a gradient of it or without."""

    def add_up(self, weight: ObservedWeight, ranks: Ranks) -> None:
        """Add up what each of several processes has gathered before training; all of them have to call it."""

    def memory(self) -> torch.Tensor | None:
        """Return memory of the weight's shape that is free when the evidence has been used."""
        return None

    def state(self, weight: ObservedWeight, *, ends: bool) -> State:
        """Return what an exact resume needs."""
        return State()


class Evidence:
    """No evidence, for scores that look at the weights alone.

    Args:
        dtype: `DPSConfig.score_dtype`.

    Attributes:
        looks: Whether gradients are looked at.
        power: What is added up is abs(G) ** power; None for anything else, which compact storage cannot gather.
    """

    looks: ClassVar[bool] = False
    power: ClassVar[int | None] = None

    def __init__(self, dtype: Any = "float32") -> None:
        if not isinstance(dtype, str) or dtype not in SCORE_DTYPES:
            raise ConfigError(f"`score_dtype` must be one of {', '.join(map(repr, SCORE_DTYPES))}, got {dtype!r}.")
        self.dtype = SCORE_DTYPES[dtype]

    def begin(self) -> Gathered:
        """Begin to gather of one weight."""
        return Gathered()

    def dtype_for(self, weight: torch.Tensor) -> torch.dtype | None:
        """Return the dtype of the evidence of a weight; None where there is none."""
        return None

    def gather(
        self, weights: Sequence[ObservedWeight], optimizer: Optimizer | None, grad_scale: torch.Tensor | None
    ) -> bool:
        """Look at the gradients of a step.

        Args:
            weights: The weights that have a gradient, at least one.
            optimizer: The optimizer that is about to update them; None before training.
            grad_scale: Factor that a gradient scaler has left in the gradients, or None.

        Returns:
            Whether the step could be scored: False where a gradient is not finite, on this process or on another that
            holds a part of the weights.
        """
        return True

    def load(self, saved: SavedState, weight: torch.Tensor) -> Gathered:
        """Return what a saved state holds of one weight."""
        return self.begin()


EVIDENCE: Registry[type[Evidence]] = Registry("evidence")
EVIDENCE.register("none")(Evidence)


class Sum(Gathered):
    """A sum over the steps of a phase.

    Attributes:
        total: The sum, the weight's shape; None before the first step.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.total: torch.Tensor | None = None
        self._evidence = evidence

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return self.total is None

    def value(self, weight: ObservedWeight) -> torch.Tensor:
        """Return the sum, zero if no gradient has come."""
        if self.total is None:
            dtype = self._evidence.dtype_for(weight.weight)
            self.total = weight.take_memory(dtype or torch.float32).zero_()
        if self.total.device != weight.weight.device:
            self.total = self.total.to(weight.weight.device)
        return self.total

    def add_up(self, weight: ObservedWeight, ranks: Ranks) -> None:
        """Add up the sums of all processes; see `Gathered.add_up`."""
        total = self.value(weight)
        total.copy_(ranks.sum(total.to(torch.promote_types(total.dtype, torch.float32))))

    def memory(self) -> torch.Tensor | None:
        """Return the memory of the sum."""
        return self.total

    def state(self, weight: ObservedWeight, *, ends: bool) -> State:
        """Return the sum."""
        return State(tensors={} if self.total is None else {"total": self.total})


class SummedGradients(Evidence):
    """Adds up some power of the gradients. A subclass says `add_`."""

    looks = True

    def begin(self) -> Sum:
        """Begin a sum."""
        return Sum(self)

    def dtype_for(self, weight: torch.Tensor) -> torch.dtype:
        """Return `score_dtype`; "float32" means fp64 for an fp64 weight."""
        return torch.promote_types(weight.dtype, self.dtype) if self.dtype is torch.float32 else self.dtype

    def gather(
        self, weights: Sequence[ObservedWeight], optimizer: Optimizer | None, grad_scale: torch.Tensor | None
    ) -> bool:
        """Add the gradients of a step; see `Evidence.gather`."""
        gradients = [weight.gradient for weight in weights]
        finite = are_finite(gradients)
        everywhere = [not ranks.any(not finite) for ranks in distinct(weight.ranks for weight in weights)]
        if not (finite and all(everywhere)):
            return False
        totals = [total for weight in weights if (total := weight.gathered.value(weight)) is not None]
        self.add_(totals, gradients, 1.0 if grad_scale is None else float(grad_scale))
        return True

    def add_(self, totals: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], scale: float) -> None:
        """Add to the sums in place.

        Args:
            totals: The sums so far, one per weight. Bf16 sums are added to in fp32, and rounded once.
            gradients: Gradients the optimizer is about to apply, same shapes, any floating dtype.
            scale: Factor that a gradient scaler has left in the gradients.
        """
        raise NotImplementedError

    def load(self, saved: SavedState, weight: torch.Tensor) -> Sum:
        """Return the sum that a saved state holds."""
        gathered = self.begin()
        if "total" in saved:
            gathered.total = saved.amounts("total", weight.shape, self.dtype_for(weight)).to(weight.device, copy=True)
        return gathered


@EVIDENCE.register("squared_gradient")
class SquaredGradients(SummedGradients):
    """S = sum over the phase of G * G (arXiv:2211.01642)."""

    power = 2

    @torch.no_grad()
    def add_(self, totals: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], scale: float) -> None:
        """Add (G / scale)^2; see `SummedGradients.add_`."""
        factor = scale**-2
        if all(gradient.dtype == total.dtype for total, gradient in zip(totals, gradients, strict=True)):
            torch._foreach_addcmul_(list(totals), list(gradients), list(gradients), value=factor)
            return
        for total, gradient in zip(totals, gradients, strict=True):
            for part, wide in _widened(total, gradient):
                part.addcmul_(wide, wide, value=factor)


@EVIDENCE.register("absolute_gradient")
class AbsoluteGradients(SummedGradients):
    """S = sum over the phase of abs(G) (SIFT, arXiv:2312.11875)."""

    power = 1

    @torch.no_grad()
    def add_(self, totals: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], scale: float) -> None:
        """Add abs(G) / scale; see `SummedGradients.add_`."""
        for total, gradient in zip(totals, gradients, strict=True):
            for part, wide in _widened(total, gradient):
                part.add_(wide.abs(), alpha=1.0 / scale)


def _widened(total: torch.Tensor, gradient: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a sum to add to, and what to add in a dtype as wide; bf16 sums by pieces that are written back."""
    if total.dtype is not torch.bfloat16:  # one wider copy at a time
        yield total, gradient.to(total.dtype)
        return
    for part, piece in _pieces(total, gradient):
        sum_ = part.to(torch.float32)
        yield sum_, piece.to(torch.float32)
        part.copy_(sum_)


def _pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Cut tensors of the same shape into pieces whose wider copies stay in the cache, where their layout allows it."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    chunk = _CPU_CHUNK if tensors[0].device.type == "cpu" else _DEVICE_CHUNK
    return zip(*(tensor.view(-1).split(chunk) for tensor in tensors), strict=True)


@torch.no_grad()
def are_finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Tell whether gradients are finite."""
    wide = torch.float64 if any(gradient.dtype is torch.float64 for gradient in gradients) else torch.float32
    if all(each.device.type == "cpu" and each.is_contiguous() and each.element_size() >= 4 for each in gradients):
        flat = (gradient.view(-1) for gradient in gradients)  # a dot product reads at twice the speed of a norm
        sizes: list[Any] = [torch.dot(each, each).to(wide) for each in flat]
    else:
        norms = torch._foreach_norm(list(gradients), 2, dtype=wide)
        sizes = [norm.to(gradients[0].device) for norm in norms]
    if bool(torch.stack(sizes).isfinite().all()):
        return True
    # The sum of the squares may exceed the range of what is finite itself.
    return all(bool(gradient.isfinite().all()) for gradient in gradients)
