"""The HF Trainer: tells DPS the number of steps, and its logs what DPS does."""

from __future__ import annotations

import logging
from typing import Any

import transformers.trainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_dps.adapters import find_subnetworks
from peft_dps.errors import ConfigError, EngineError
from peft_dps.schedule import Stage, StageSchedule
from peft_dps.status import selected_fraction_of
from peft_dps.subnetwork import Subnetwork

logger = logging.getLogger(__name__)


class DPSTrainerCallback(TrainerCallback):
    """Every `Trainer` has it from `import peft_dps` on; there is no need to pass it."""

    def __init__(self) -> None:
        self._subnetworks: list[Subnetwork] = []
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the stages anew, with the Trainer's number of optimizer steps."""
        model: nn.Module = kwargs["model"]
        self._subnetworks = [
            subnetwork
            for subnetwork in find_subnetworks(model).values()
            if any(weight.weight.requires_grad for weight in subnetwork.weights)
        ]
        self._first_step = state.global_step
        for subnetwork in self._subnetworks:
            subnetwork.restart(subnetwork.config.total_steps or state.max_steps)
            _check_that_it_fits(subnetwork, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the Trainer's optimizer steps reach DPS."""
        # A gradient scaler may skip the first steps while it looks for its scale.
        if state.global_step - self._first_step >= 10:
            self._check_engaged(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once more that DPS took part in the training."""
        if state.global_step > self._first_step:
            self._check_engaged(state)
        for subnetwork in self._subnetworks:
            if selected_fraction_of(subnetwork) is None and subnetwork.step > 0:
                logger.warning("Adapter %r: training ended before a subnetwork was selected.", subnetwork.adapter)
        self._subnetworks = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the stage and the selected fraction to the Trainer's history, and as numbers to what it reports."""
        if logs is None or "loss" not in logs:
            return
        several = len(self._subnetworks) > 1
        for subnetwork in self._subnetworks:
            if subnetwork.position is None:
                continue
            suffix = f"/{subnetwork.adapter}" if several else ""
            stage, selected = subnetwork.position.stage, selected_fraction_of(subnetwork)
            # What goes on to TensorBoard and its like has to be numbers.
            logs[f"dps_cycle{suffix}"] = subnetwork.position.cycle
            logs[f"dps_subnetwork{suffix}"] = int(stage is Stage.SUBNETWORK)
            if selected is not None:
                logs[f"dps_selected{suffix}"] = selected
            if state.log_history and "loss" in state.log_history[-1]:
                entry: dict[str, Any] = state.log_history[-1]
                entry[f"dps_cycle{suffix}"] = subnetwork.position.cycle
                entry[f"dps_stage{suffix}"] = stage.value
                entry[f"dps_selected{suffix}"] = selected

    def _check_engaged(self, state: TrainerState) -> None:
        for subnetwork in self._subnetworks:
            if subnetwork.step == 0:
                steps = state.global_step - self._first_step
                raise EngineError(
                    f"The Trainer has made {steps} steps, but DPS has seen none on adapter {subnetwork.adapter!r}. "
                    "Its engine updates copies of the weights (DeepSpeed ZeRO, FSDP1, CPU offloading); train with DDP "
                    "or on one process."
                )


def _check_that_it_fits(subnetwork: Subnetwork, state: TrainerState) -> None:
    stage_steps = StageSchedule.resolve(subnetwork.config.stage_steps, subnetwork.total_steps).stage_steps
    if stage_steps < state.max_steps - state.global_step:
        return
    text = (
        f"Adapter {subnetwork.adapter!r}: a stage takes {stage_steps} steps (`stage_steps="
        f"{subnetwork.config.stage_steps}`, `total_steps={subnetwork.config.total_steps}`), and the Trainer has only "
        f"{state.max_steps - state.global_step} to make, so no subnetwork will be selected. Use a smaller "
        "`stage_steps`, or leave `total_steps` to the Trainer."
    )
    if state.global_step == 0:
        raise ConfigError(text)
    logger.warning(text)  # a resumed training is allowed to run out


def install() -> None:
    """Put the callback among those that every `Trainer` starts with."""
    defaults: list[type[TrainerCallback]] = transformers.trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    defaults[:] = [
        callback for callback in defaults if getattr(callback, "__name__", None) != DPSTrainerCallback.__name__
    ]
    defaults.append(DPSTrainerCallback)
