"""What is seen of a training while it runs: losses, evaluations, times, and what DPS does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from peft_dps import DPSStatus, Stage
from peft_dps.compare.runs import dps
from peft_dps.compare.runs.machine import synchronize
from peft_dps.compare.runs.run import Evaluation, Selection, mean_score

Report = Callable[[int, int, str], None]
"""Takes the step, the number of steps and a note."""

_LOSSES = 40  # numbers of a learning curve at most
_EVEN = 0.005  # fractions that differ by less are equal up to rounding


class Recorder(TrainerCallback):
    """Watches a training.

    Args:
        metrics: Names of the metrics whose mean is the score.
        looks: How often to evaluate, evenly spread; the last time after the last step.
        report: Told of every step.

    Attributes:
        losses: Training loss of every step.
        evaluations: Looks at the validation split.
        seconds: Wall time of the steps, without evaluations.
        selections: DPS: the subnetworks in order.
        status: DPS: its status at the end of the last SUBNETWORK stage, or of a training that selects nothing.
        validation: Metrics on the validation split at the latest look.
    """

    def __init__(self, metrics: tuple[str, ...], looks: int, report: Report) -> None:
        self.metrics, self.looks, self.report = list(metrics), looks, report
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.seconds = 0.0
        self.selections: list[Selection] = []
        self.status: DPSStatus | None = None
        self.validation: dict[str, float] = {}
        self._started = 0.0
        self._stage = ""
        self._next = 1  # the step after which DPS may have changed its stage, or is about to
        self._masks: dict[str, np.ndarray | None] = {}
        self._fractions: dict[str, float] = {}

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the watch."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the watch, look at DPS, and ask for an evaluation when it is time."""
        synchronize()  # else the watch measures how fast work is queued
        self.seconds += time.perf_counter() - self._started
        is_last = state.global_step == state.max_steps
        if is_last or state.global_step == self._next:
            self._look_at(kwargs["model"], state.global_step, is_last=is_last)
        due = {round(look * state.max_steps / self.looks) for look in range(1, self.looks + 1)}
        control.should_evaluate = state.global_step in due

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.report(state.global_step, state.max_steps, f"loss {self.losses[-1]:.2f}{self._stage}")

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, metrics: Any = None, **kw: Any) -> None:
        """Keep the evaluation; of two after the same step the latter, when the method has ended."""
        self.evaluations = [look for look in self.evaluations if look.step != state.global_step]
        self.validation = {name: float(metrics[f"eval_{name}"]) for name in self.metrics}
        score = mean_score(self.validation, self.metrics)
        self.evaluations.append(Evaluation(state.global_step, metrics["eval_loss"], score))

    @property
    def fractions(self) -> dict[str, float]:
        """DPS: per weight, the fraction of its entries in the last subnetwork; empty if it is the same for all."""
        shares = self._fractions.values()
        is_even = not shares or max(shares) - min(shares) < _EVEN
        return {} if is_even else {name: round(share, 3) for name, share in self._fractions.items()}

    def _look_at(self, model: nn.Module, step: int, *, is_last: bool) -> None:
        status = dps.status_of(model)
        if status is None or status.stage is None:
            return
        self._stage = f", {status.stage.value}"
        left = (status.stage_steps or 0) - (status.step_in_stage or 0)
        self._next = step + max(1, left)
        if status.stage is not Stage.SUBNETWORK:
            self.status = status if is_last and not self.selections else self.status
            return
        if status.step_in_stage == 1:
            self.selections.append(self._select(model, status, step))
        self.selections[-1] = replace(self.selections[-1], last=step)
        if is_last or left == 0:
            self.status = status

    def _select(self, model: nn.Module, status: DPSStatus, step: int) -> Selection:
        found = dps.masks_of(model)
        masks = {name: found.get(name) for name in status.layers}
        fractions = {name: (layer.selected or 0) / layer.entries for name, layer in status.layers.items()}
        overlaps = [jaccard(self._masks[name], mask) for name, mask in masks.items() if name in self._masks]
        chances = [chance(self._fractions[name], share) for name, share in fractions.items() if name in self._masks]
        self._masks, self._fractions = masks, fractions
        selection = Selection(status.cycle or 0, step, step)
        if not overlaps:
            return selection
        shown = [round(value, 3) for value in (statistics.fmean(overlaps), min(overlaps), max(overlaps))]
        return replace(selection, overlap=shown, chance=round(statistics.fmean(chances), 3))


def thinned(losses: Sequence[float]) -> tuple[list[float], int]:
    """Return means of equally many losses each, so many that few numbers are left, and how many each is of."""
    every = max(1, -(-len(losses) // _LOSSES))
    parts = [losses[first : first + every] for first in range(0, len(losses), every)]
    return [float(f"{statistics.fmean(part):.4g}") for part in parts], every


def jaccard(one: np.ndarray | None, other: np.ndarray | None) -> float:
    """Return the entries in both of two masks in bits over those in either; None is a mask of all entries."""
    if one is None or other is None:
        return 1.0
    union = int(np.unpackbits(one | other).sum())
    return int(np.unpackbits(one & other).sum()) / union if union else 1.0


def chance(a: float, b: float) -> float:
    """Return the overlap that independent random masks have on average.

    Of two masks that hold the fractions a and b of a large weight, ab lie in both and a + b - ab in one or both.
    """
    either = a + b - a * b
    return a * b / either if either else 1.0
