"""The HF Trainer: tells DPS the number of steps, its logs what DPS does, and its checkpoints where DPS is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers.trainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from peft_dps.checkpoint import file as statefile
from peft_dps.checkpoint import saving
from peft_dps.errors import ConfigError, EngineError
from peft_dps.integrations.trainer_checkpoints import (
    PartsSaver,
    checkpoint_folder,
    find_state,
    saved_digests,
    warn_of_incomplete_checkpoint,
)
from peft_dps.selection.phase import Stage
from peft_dps.training.controller import Controller
from peft_dps.training.guards import refuse_unseen_steps
from peft_dps.training.status import selected_fraction_of
from peft_dps.tuner.adapter import all_controllers, find_trained

logger = logging.getLogger(__name__)


class DPSTrainerCallback(TrainerCallback, ExportableState):
    """Every `Trainer` has it from `import peft_dps` on; there is no need to pass it.

    Attributes:
        saved: Per adapter, the digest of the training state in the latest checkpoint.
    """

    def __init__(self) -> None:
        self.saved: dict[str, str] = {}
        self._controllers: list[Controller] = []
        self._first_step = 0
        self._begun_at: dict[str, int] = {}
        self._training: tuple[TrainingArguments, TrainerState] | None = None
        self._parts: PartsSaver | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of a newest checkpoint that was not written to its end, which `resume_from_checkpoint=True` takes."""
        if find_trained(kwargs["model"]):
            warn_of_incomplete_checkpoint(Path(str(args.output_dir)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the stages, with the Trainer's number of optimizer steps, or go on where the checkpoint was."""
        model: nn.Module = kwargs["model"]
        resumed = state.global_step > 0
        saved = saved_digests(state, type(self).__name__)
        self._training, self.saved = None, {}
        # The Trainer wants an entry of every callback that has a state, also where the checkpoint has none.
        entries: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        entries.setdefault(type(self).__name__, self.state())
        self._controllers = list(find_trained(model).values())
        for controller in all_controllers(model):
            controller.at_rest = controller not in self._controllers
        if not resumed:
            _check_reference(all_controllers(model))
        self._first_step = state.global_step
        for controller in self._controllers:
            controller.restart(controller.planned_steps or state.max_steps)
            if resumed:
                saving.load(controller, find_state(controller.adapter, saved, args, state))
            else:
                controller.keep_selection()
                _check_that_it_fits(controller, state)
        self._begun_at = {controller.adapter: controller.clock.step for controller in self._controllers}
        self._training = args, state
        self._close_parts()
        self._parts = PartsSaver(self._controllers, kwargs.get("optimizer"), args, state)

    def state(self) -> dict[str, Any]:
        """Save the training state into the checkpoint that is being written, and tell the Trainer its digest.

        The Trainer asks for it after the weights and the optimizer, and before it writes `trainer_state.json` and
        deletes older checkpoints. So a checkpoint with that file is complete, whenever the process is killed.
        """
        # A Trainer also asks when it makes its own state, which an interrupted training must not answer by saving.
        making = sys._getframe(1).f_code is TrainerState.__post_init__.__code__
        if self._training is not None and not making:
            folder = checkpoint_folder(*self._training)
            # The folder is another one in a hyperparameter search, whose trials are not resumed.
            wanted = folder.is_dir() and not self._training[0].save_only_model
            self.saved = {each.adapter: self._save(each, folder) for each in (self._controllers if wanted else [])}
        return {"args": {}, "attributes": {"saved": self.saved}}

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
        for controller in all_controllers(kwargs["model"]):
            controller.at_rest = False
        if state.global_step > self._first_step:
            self._check_engaged(state)
        trained, self._controllers, self._training = self._controllers, [], None
        self._close_parts()
        if state.global_step > self._first_step:
            for controller in trained:
                controller.require_selection()

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
        several = len(self._controllers) > 1
        for controller in self._controllers:
            if controller.clock.position is None:
                continue
            suffix = f"/{controller.adapter}" if several else ""
            stage, selected = controller.clock.position.phase.stage, selected_fraction_of(controller)
            # What goes on to TensorBoard and its like has to be numbers.
            logs[f"dps_cycle{suffix}"] = controller.clock.position.cycle
            logs[f"dps_subnetwork{suffix}"] = int(stage is Stage.SUBNETWORK)
            if selected is not None:
                logs[f"dps_selected{suffix}"] = selected
            if state.log_history and "loss" in state.log_history[-1]:
                entry: dict[str, Any] = state.log_history[-1]
                entry[f"dps_cycle{suffix}"] = controller.clock.position.cycle
                entry[f"dps_stage{suffix}"] = stage.value
                entry[f"dps_selected{suffix}"] = selected

    def _save(self, controller: Controller, folder: Path) -> str:
        if self._parts is not None and controller.adapter in self._parts:
            return self._parts.finish(controller.adapter)
        return saving.save(controller, statefile.path_in(folder, controller.adapter))

    def _close_parts(self) -> None:
        if self._parts is not None:
            self._parts.close()
        self._parts = None

    def _check_engaged(self, state: TrainerState) -> None:
        for controller in self._controllers:
            unseen = controller.clock.step == self._begun_at[controller.adapter]
            if unseen and controller.has_to_see_steps:
                refuse_unseen_steps(controller.adapter, state.global_step - self._first_step)


def _check_reference(controllers: Iterable[Controller]) -> None:
    """Refuse a reference that TRL meant to copy from the adapter, by names that only tuners with modules have."""
    named = {controller.adapter: controller for controller in controllers}
    reference, trained = (named.get(name) for name in ("ref", "default"))
    if reference is None or trained is None or not reference.at_rest:
        return
    trained_moved, reference_moved = (
        any(weight.has_moved() for weight in controller.weights) for controller in (trained, reference)
    )
    if trained_moved and not reference_moved:
        raise EngineError(
            "The adapter 'ref' holds the pretrained weights, and 'default', from which the training starts, does not: "
            "TRL could not copy one to the other for its reference. Merge the adapter into the model first "
            "(`model.merge_and_unload()`), and let the trainer make a new one (`peft_config=DPSConfig(...)`)."
        )


def _check_that_it_fits(controller: Controller, state: TrainerState) -> None:
    schedule, adapter = controller.clock.resolved, controller.adapter
    length = schedule.at(1).length
    if schedule.selects and not any(schedule.at(step).phase.masked for step in range(1, state.max_steps + 1)):
        raise ConfigError(
            f"Adapter {adapter!r}: the first stage takes {length} steps (`total_steps={controller.planned_steps}`), "
            f"and the Trainer has only {state.max_steps} to make, so no subnetwork will be selected. Use a smaller "
            f"`{schedule.waits_for}`, or leave `total_steps` to the Trainer."
        )
    if controller.recipe.schedule.is_relative and controller.clock.total_steps != state.max_steps:
        logger.warning(
            "Adapter %r: `total_steps` is %s, and the Trainer will make %s steps. A stage has %s steps, which is its "
            "fraction of the former. Leave `total_steps` out to have it of the latter.",
            adapter,
            controller.clock.total_steps,
            state.max_steps,
            length,
        )


def install() -> None:
    """Put the callback among those that every `Trainer` starts with."""
    defaults: list[type[TrainerCallback]] = transformers.trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    defaults[:] = [
        callback for callback in defaults if getattr(callback, "__name__", None) != DPSTrainerCallback.__name__
    ]
    defaults.append(DPSTrainerCallback)
