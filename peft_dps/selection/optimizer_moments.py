"""Scores from the optimizer's second moment: what lean mode has in place of scores of its own.

Adam keeps v <- beta2 * v + (1 - beta2) * G * G, so what a stage of n steps has added to it is

    S = (v_n - beta2^n * v_0) / (1 - beta2) = sum over the stage of beta2^(n - i) * G_i * G_i,

the accumulated squared gradient with weights from beta2^(n - 1) to 1. v_0 waits in a file until the stage ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from peft_dps.errors import EngineError
from peft_dps.tensors.file import on_disk
from peft_dps.tensors.scratch import scratch
from peft_dps.tensors.shards import local_part

_CPU_CHUNK = 1 << 18  # entries whose scores stay in a CPU's cache
_COUPLED = (Adam, NAdam, RAdam, RMSprop, Adagrad)  # add weight decay to the gradient unless told otherwise


@dataclass(frozen=True)
class SecondMoment:
    """What an optimizer remembers of the squared gradients of one weight: v <- decay * v + share * G * G.

    Attributes:
        value: v, the weight's shape, or this process's rows of it; None before the first step.
        decay: Factor in [0, 1].
        share: Factor above 0.
        state: What the optimizer keeps it in; None before the first step.
    """

    value: torch.Tensor | None
    decay: float
    share: float
    state: torch.Tensor | None = None


def state_of_second_moment(optimizer: Optimizer, parameter: torch.Tensor) -> torch.Tensor | None:
    """Return what an optimizer keeps the second moment of a weight in, whatever it is like; None if nothing yet."""
    value = optimizer.state.get(parameter, {}).get(_key_of(optimizer))
    return value if isinstance(value, torch.Tensor) else None


def _key_of(optimizer: Optimizer) -> str:
    if isinstance(optimizer, RMSprop):
        return "square_avg"
    return "sum" if isinstance(optimizer, Adagrad) else "exp_avg_sq"


def second_moments(optimizer: Optimizer, weights: Mapping[str, torch.Tensor]) -> dict[str, SecondMoment]:
    """Look up the second moments of weights."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {name: _second_moment(optimizer, groups[id(weight)], weight, name) for name, weight in weights.items()}


def _second_moment(optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor, name: str) -> SecondMoment:
    if isinstance(optimizer, RMSprop):
        decay, share = group["alpha"], 1.0 - group["alpha"]
    elif isinstance(optimizer, Adagrad):
        decay, share = 1.0, 1.0
    else:
        decay = float(group.get("betas", (0.0, 1.0))[1])
        share = 1.0 - decay
    state, kind = optimizer.state.get(parameter, {}), type(optimizer).__name__
    value = state.get(_key_of(optimizer))
    if share <= 0.0 or (state and not _is_like(value, parameter)):
        raise EngineError(
            f"`lean=True` takes scores from the optimizer's second moment, and {kind} keeps none of {name!r} that DPS "
            "can read: of the weight's shape, in fp32 or fp64. Use torch.optim.AdamW on weights in fp32, or "
            "`lean=False`."
        )
    if isinstance(optimizer, _COUPLED) and group.get("weight_decay") and not _is_decoupled(optimizer, group):
        raise EngineError(
            f"`lean=True` takes scores from the optimizer's second moment, and {kind} with "
            f"weight_decay={group['weight_decay']} adds the weight itself to the gradient. Use torch.optim.AdamW, "
            "weight_decay=0, or `lean=False`."
        )
    return SecondMoment(None if value is None else local_part(value), decay, share, value)


class MomentScores:
    """Scores of one weight in one ACCUMULATE stage, made from the second moment when they are asked for.

    Args:
        before: v_0, the second moment when the stage began; None for zero.
        share: 1 - beta2.
        decay: beta2^n.
        steps: n, the steps so far.

    Attributes:
        before: v_0, mapped from a file; None for zero.
    """

    def __init__(self, before: torch.Tensor | None, share: float, decay: float = 1.0, steps: int = 0) -> None:
        self.share = share
        self.decay = decay
        self.steps = steps
        self.before = None if before is None else on_disk(before)

    @property
    def facts(self) -> dict[str, Any]:
        """What there is besides v_0, in plain values."""
        return {"share": self.share, "decay": self.decay, "steps": self.steps}

    def count_step(self, decay: float) -> None:
        """Take note of a step."""
        self.decay *= decay
        self.steps += 1

    def scores(self, now: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Work out the accumulated squared gradients."""
        if self.before is None:
            return torch.div(now, self.share, out=out)
        floor = (self.steps + 1) * torch.finfo(now.dtype).eps
        rows = len(out) if out.device.type != "cpu" else max(1, _CPU_CHUNK * len(out) // max(1, out.numel()))
        pieces = zip(self.before.split(rows), now.split(rows), out.split(rows), strict=True)
        for before, value, score in pieces:
            left = scratch.like(score, "second moment")
            torch.mul(before.to(score.device, score.dtype), self.decay, out=left)
            torch.sub(value, left, out=score)
            # Rounding leaves a little, or less than nothing, where no gradient came.
            above = torch.gt(score, left.mul_(floor), out=left)  # in floats, since torch is slow at writing bool
            score.mul_(above).abs_().div_(self.share)
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        return MomentScores, (self.before, self.share, self.decay, self.steps)  # a copy has a file of its own


def _is_like(value: object, parameter: torch.Tensor) -> bool:
    """Tell whether a second moment can be read; in 16 bits what a stage adds is lost in its rounding."""
    if not (isinstance(value, torch.Tensor) and value.shape == parameter.shape):
        return False
    return value.is_floating_point() and value.element_size() >= 4


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))
