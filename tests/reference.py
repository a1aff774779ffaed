"""The specification of DPS Dense as plain slow code: Python lists and loops, one weight at a time.

It knows nothing of PEFT or hooks: the caller runs `before_step` when the gradients are ready, then the optimizer's own
step, then `after_step`.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class ReferenceDense:
    def __init__(
        self,
        weights: list[nn.Parameter],
        *,
        density: float,
        stage_steps: int,
        scope: str = "tensor",
        frozen: str = "exact",
    ) -> None:
        self.weights = weights
        self.density = density
        self.stage_steps = stage_steps
        self.scope = scope
        self.frozen = frozen
        self.step = 0
        self.scores: list[list[float]] = [[] for _ in weights]
        self.masks: list[torch.Tensor] = []
        self.before: list[torch.Tensor] = []

    @property
    def accumulating(self) -> bool:
        return ((self.step - 1) // self.stage_steps) % 2 == 0

    def before_step(self) -> None:
        self.step += 1
        first_of_stage = (self.step - 1) % self.stage_steps == 0
        if self.accumulating:
            for index, weight in enumerate(self.weights):
                squares = (weight.grad.float() * weight.grad.float()).flatten()
                if first_of_stage:
                    self.scores[index] = [torch.tensor(0.0)] * weight.numel()
                self.scores[index] = [
                    total + square for total, square in zip(self.scores[index], squares, strict=True)
                ]
            return
        if first_of_stage:
            self.masks = self.select()
        self.before = [weight.detach().clone() for weight in self.weights]
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.grad = torch.where(mask, weight.grad, torch.zeros_like(weight.grad))

    def after_step(self) -> None:
        if self.accumulating or self.frozen == "gradient":
            return
        for weight, mask, before in zip(self.weights, self.masks, self.before, strict=True):
            weight.data = torch.where(mask, weight.data, before)

    def select(self) -> list[torch.Tensor]:
        if self.scope == "tensor":
            chosen = [set(best(scores, self.density)) for scores in self.scores]
        else:
            ranked = best([score for scores in self.scores for score in scores], self.density)
            chosen, start = [], 0
            for scores in self.scores:
                chosen.append({index - start for index in ranked if start <= index < start + len(scores)})
                start += len(scores)
        return [
            torch.tensor([index in indices for index in range(weight.numel())]).view(weight.shape)
            for indices, weight in zip(chosen, self.weights, strict=True)
        ]


def best(scores: list[float], density: float) -> list[int]:
    """Indices of the ceil(n * density) best scores; of equal ones the first."""
    ranked = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    return ranked[: math.ceil(len(scores) * density)]
