"""Accelerate: `save_state` and `load_state` with the training state of DPS."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from peft_dps.checkpoint import file as statefile
from peft_dps.checkpoint import saving
from peft_dps.errors import ConfigError
from peft_dps.tuner.adapter import find_trained


def register_for_checkpointing(accelerator: Accelerator, model: nn.Module) -> None:
    """Let `accelerator.save_state` save the training state of a model's DPS adapters, and `load_state` load it.

    Call it once, before either. The states are files of their own in the checkpoint folder. What
    `accelerator.register_for_checkpointing` is given is only a mark: by it Accelerate notices at loading that a state
    was saved and nobody registered, or the other way round, and it calls back when the weights are there.

    Args:
        accelerator: The accelerator.
        model: The model, prepared or not, into which DPS adapters were injected.

    Raises:
        ConfigError: If the model trains no DPS adapter, or one of a name that is registered already.
    """
    adapters = find_trained(model)
    if not adapters:
        raise ConfigError("The model trains no DPS adapter, so there is no training state to save.")
    others = _marks.setdefault(accelerator, weakref.WeakSet())
    taken = sorted({name for mark in others for name in mark.state_dict()["adapters"]} & adapters.keys())
    if taken:
        raise ConfigError(
            f"The DPS adapter {taken[0]!r} is registered with this accelerator already, and training states are files "
            "named after adapters. Register a model once, give the adapters of several models different names "
            "(`get_peft_model(model, config, adapter_name='student')`), and make a new Accelerator for a new training."
        )
    mark = _Mark(accelerator, model)
    others.add(mark)
    accelerator.register_save_state_pre_hook(mark.save)
    accelerator.register_load_state_pre_hook(mark.locate)
    accelerator.register_for_checkpointing(mark)


# A mark knows its accelerator, which keeps it alive; a strong reference here would keep both, and the model.
_marks: weakref.WeakKeyDictionary[Accelerator, weakref.WeakSet[_Mark]] = weakref.WeakKeyDictionary()


class _Mark:
    """What Accelerate knows of DPS. It loads custom objects last, when the weights are there, but tells no folder."""

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self._accelerator = accelerator
        self._model = model
        self._folder: Path | None = None

    def save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        accelerator = self._accelerator
        every_node = accelerator.project_configuration.save_on_each_node
        saves = accelerator.is_local_main_process if every_node else accelerator.is_main_process
        for adapter, controller in find_trained(self._model).items():
            if saves or saving.processes_of(controller):  # which all save their rows
                saving.save(controller, statefile.path_in(folder, adapter))

    def locate(self, models: list[nn.Module], folder: str) -> None:
        self._folder = Path(folder)

    def state_dict(self) -> dict[str, Any]:
        return {"adapters": sorted(find_trained(self._model))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._folder is None:
            raise ConfigError("Load the training state of DPS with `accelerator.load_state(folder)`.")
        for adapter, controller in find_trained(self._model).items():
            saving.load(controller, statefile.path_in(self._folder, adapter))
