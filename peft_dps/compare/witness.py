"""What is seen of a training while it runs: losses, evaluations, times, and what DPS does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from peft_dps.compare.run import Evaluation, Selection, Span, mean_score
from peft_dps.selection.schedule import Stage
from peft_dps.training.controller import Subnetwork
from peft_dps.training.status import DPSStatus, status_of
from peft_dps.tuner.adapter import find_subnetworks

Report = Callable[[int, int, str], None]
"""Takes the step, the number of steps and a note."""


class Witness(TrainerCallback):
    """Watches a training.

    Args:
        metrics: Names of the metrics whose mean is the score.
        looks: How often to evaluate, evenly spread; the last time after the last step.
        report: Told of every step.

    Attributes:
        losses: Training loss of every step.
        evaluations: Looks at the validation split.
        step_seconds: Wall time of every step, without evaluations.
        stages: DPS: the stages in order.
        selections: DPS: the subnetworks in order.
        status: DPS: its status at the end of the last SUBNETWORK stage.
        validation: Metrics on the validation split at the latest look.
    """

    def __init__(self, metrics: tuple[str, ...], looks: int, report: Report) -> None:
        self.metrics, self.looks, self.report = list(metrics), looks, report
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.step_seconds: list[float] = []
        self.stages: list[Span] = []
        self.selections: list[Selection] = []
        self.status: DPSStatus | None = None
        self.validation: dict[str, float] = {}
        self._started = 0.0
        self._masks: dict[str, np.ndarray | None] = {}

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the watch."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the watch, look at DPS, and ask for an evaluation when it is time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the watch measures how fast work is queued
        self.step_seconds.append(time.perf_counter() - self._started)
        for subnetwork in find_subnetworks(kwargs["model"]).values():
            self._look_at(subnetwork, state)
        due = {round(look * state.max_steps / self.looks) for look in range(1, self.looks + 1)}
        control.should_evaluate = state.global_step in due

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            stage = f", {self.stages[-1].stage}" if self.stages else ""
            self.report(state.global_step, state.max_steps, f"loss {self.losses[-1]:.2f}{stage}")

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, metrics: Any = None, **kw: Any) -> None:
        """Keep the evaluation."""
        self.validation = {name: float(metrics[f"eval_{name}"]) for name in self.metrics}
        score = mean_score(self.validation, self.metrics)
        self.evaluations.append(Evaluation(state.global_step, sum(self.step_seconds), metrics["eval_loss"], score))

    def _look_at(self, subnetwork: Subnetwork, state: Any) -> None:
        position, schedule = subnetwork.position, subnetwork.schedule
        if position is None or schedule is None:
            return
        latest = self.stages[-1] if self.stages else None
        if latest and (latest.stage, latest.cycle) == (position.stage.value, position.cycle):
            self.stages[-1] = Span(latest.stage, latest.cycle, latest.first, state.global_step)
        else:
            self.stages.append(Span(position.stage.value, position.cycle, state.global_step, state.global_step))
        if position.stage is not Stage.SUBNETWORK:
            return
        if self.stages[-1].first == state.global_step:
            self.selections.append(self._selection(subnetwork, position.cycle, state.global_step))
        if position.step_in_stage == schedule.stage_steps or state.global_step == state.max_steps:
            self.status = status_of(subnetwork)

    def _selection(self, subnetwork: Subnetwork, cycle: int, step: int) -> Selection:
        masks = {weight.name: _packed(weight.keep) for weight in subnetwork.weights}
        overlap = {name: _jaccard(self._masks[name], mask) for name, mask in masks.items() if name in self._masks}
        self._masks = masks
        fraction = {
            weight.name: weight.selected / weight.weight.numel()
            for weight in subnetwork.weights
            if weight.selected is not None
        }
        return Selection(cycle, step, fraction, overlap)


def selected_entries(model: nn.Module, status: DPSStatus | None) -> int | None:
    """Return the entries that are updated while the subnetwork is; None without DPS.

    Args:
        model: The model.
        status: What DPS said last.
    """
    if status is None or status.selected is None:
        return None
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable - status.entries + status.selected


def _packed(keep: torch.Tensor | None) -> np.ndarray | None:
    """Pack a mask into bits; None, for no mask, selects all."""
    return None if keep is None else np.packbits((keep < 0).cpu().numpy())


def _jaccard(one: np.ndarray | None, other: np.ndarray | None) -> float:
    if one is None or other is None:
        return 1.0
    union = int(np.bitwise_count(one | other).sum())
    return int(np.bitwise_count(one & other).sum()) / union if union else 1.0
