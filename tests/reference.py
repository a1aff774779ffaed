"""The specification of DPS as plain slow code: Python lists and loops, one weight at a time.

It knows nothing of PEFT or hooks: the caller runs `before_step` when the gradients are ready, then the optimizer's own
step, then `after_step`. Mix also wants `effective` in place of the weight in every forward.
"""

from __future__ import annotations

import math
from itertools import product

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
        forget: float = 1.0,
        adds_up_in: torch.dtype = torch.float32,
        units=None,
        reduction: str = "mean",
    ) -> None:
        self.weights = weights
        self.units = units  # per weight, a function of the index of an entry that names its unit; None for entries
        self.reduction = reduction
        self.forget = forget  # factor of scores from step to step: 1 but for scores from a second moment
        self.adds_up_in = adds_up_in
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
                    (self.forget * total + square).to(self.adds_up_in).float()
                    for total, square in zip(self.scores[index], squares, strict=True)
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
        if self.units is not None:
            return self.select_units()
        if self.scope == "tensor":
            chosen = [set(best(scores, self.density)) for scores in self.scores]
        else:
            ranked = best([score for scores in self.scores for score in scores], self.density)
            chosen, start = [], 0
            for scores in self.scores:
                chosen.append({index - start for index in ranked if start <= index < start + len(scores)})
                start += len(scores)
        return [
            torch.tensor([index in indices for index in range(weight.numel())]).view(weight.shape).to(weight.device)
            for indices, weight in zip(chosen, self.weights, strict=True)
        ]

    def select_units(self) -> list[torch.Tensor]:
        members: dict[object, list[float]] = {}
        for name, scores, weight in zip(self.units, self.scores, self.weights, strict=True):
            for index, score in zip(product(*map(range, weight.shape)), scores, strict=True):
                members.setdefault(name(index), []).append(float(score))
        value = {
            unit: math.fsum(scores) / (len(scores) if self.reduction == "mean" else 1)
            for unit, scores in members.items()
        }
        if self.scope == "model":
            problems = [list(members)]
        else:
            problems = [list(dict.fromkeys(map(name, product(*map(range, weight.shape)))))
                        for name, weight in zip(self.units, self.weights, strict=True)]  # fmt: skip
        chosen: set[object] = set()
        for units in problems:
            ranked = sorted(units, key=lambda unit: -value[unit])  # stable: ties by position
            if self.scope == "tensor":
                chosen.update(ranked[: math.ceil(len(units) * self.density)])
                continue
            left = math.ceil(sum(len(members[unit]) for unit in units) * self.density)
            for unit in ranked:
                if left > 0:
                    chosen.add(unit)
                    left -= len(members[unit])
        return [
            torch.tensor([name(index) in chosen for index in product(*map(range, weight.shape))])
            .view(weight.shape)
            .to(weight.device)
            for name, weight in zip(self.units, self.weights, strict=True)
        ]


def best(scores: list[float], density: float) -> list[int]:
    """Indices of the ceil(n * density) best scores; of equal ones the first."""
    ranked = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    return ranked[: math.ceil(len(scores) * density)]


class ReferenceMix(ReferenceDense):
    """`draw(step)` gives for each weight 0 or 1 per column, in a shape that broadcasts over the weight."""

    def __init__(self, weights, *, draw, decay: bool, **fields) -> None:
        super().__init__(weights, **fields)
        self.pretrained = [weight.detach().clone() for weight in weights]
        self.draw = draw
        self.decay = decay
        self.participation = [torch.zeros_like(weight) for weight in weights]
        self.rows: list[torch.Tensor] = []
        self.snapshots: list[torch.Tensor] = []

    def effective(self) -> list[torch.Tensor]:
        """The weights of the coming step's forward, as autograd sees them."""
        coming = self.step + 1
        if ((coming - 1) // self.stage_steps) % 2 == 0:
            self.rows = self.draw(coming)
            return [
                noisy(weight, base, row, self.density)
                for weight, base, row in zip(self.weights, self.pretrained, self.rows, strict=True)
            ]
        if (coming - 1) % self.stage_steps == 0:
            self.masks = self.select()
            self.snapshots = [weight.detach().clone() for weight in self.weights]
        return [
            amplified(weight, snapshot, mask, self.density)
            for weight, snapshot, mask in zip(self.weights, self.snapshots, self.masks, strict=True)
        ]

    def before_step(self) -> None:
        masks = self.masks
        super().before_step()
        self.masks = masks  # chosen before the forward already
        if self.accumulating:
            first_of_stage = (self.step - 1) % self.stage_steps == 0
            for index, row in enumerate(self.rows):
                if first_of_stage:
                    self.participation[index].zero_()
                self.participation[index] += row

    def select(self) -> list[torch.Tensor]:
        raw = self.scores
        self.scores = []
        for scores, counts in zip(raw, self.participation, strict=True):
            relaxed = []
            for score, count in zip(scores, counts.flatten(), strict=True):
                value = score / max(count, torch.tensor(1.0))
                relaxed.append(value * torch.exp(-count / self.stage_steps) if self.decay else value)
            self.scores.append(relaxed)
        masks = super().select()
        self.scores = raw
        return masks


def noisy(weight, base, row, density):
    """W0 + b * (W - W0) / density, with the gradient of W being that of W_eff times b."""
    value = base + row * (weight.detach() - base) / density
    return (weight * row - (weight * row).detach()) + value


def amplified(weight, snapshot, mask, density):
    """T + M * (W - T) / density, with the gradient of W being that of W_eff times M."""
    value = snapshot + mask * (weight.detach() - snapshot) / density
    return (weight * mask - (weight * mask).detach()) + value
