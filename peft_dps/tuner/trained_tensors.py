"""The tensors that an adapter trains, each with the pretrained one that it began as, but for compact ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.peft_interface import ModulesToSaveWrapper


@dataclass(frozen=True)
class TrainedTensor:
    """A weight or bias of a DPS layer, or a floating parameter or buffer of a module in `modules_to_save`.

    Attributes:
        key: Its name in the model's state dict.
        module: Path of the layer, or of the module in `modules_to_save`.
        name: What it is there, whatever the adapter.
        value: The trained tensor.
        pretrained: The pretrained one, wherever it is now.
        in_layer: Whether it is of a DPS layer.
    """

    key: str
    module: str
    name: str
    value: torch.Tensor
    pretrained: torch.Tensor
    in_layer: bool


def trained_tensors(model: nn.Module, adapter: str) -> Iterator[TrainedTensor]:
    """Go through the tensors of an adapter."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, DPSLayer):
            # Not on the layer's device: while an adapter is loaded its copies may have none yet.
            pretrained = module.pretrained_parameter.data, module.pretrained_bias()
            containers = {"dps_weight": module.dps_weight, "dps_bias": module.dps_bias}
            for (name, container), original in zip(containers.items(), pretrained, strict=True):
                if adapter in container and original is not None:
                    yield TrainedTensor(f"{prefix}{name}.{adapter}", path, name, container[adapter], original, True)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            originals = _floating(module.original_module)
            for name, copy in _floating(module.modules_to_save[adapter]).items():
                key = f"{prefix}modules_to_save.{adapter}.{name}"
                yield TrainedTensor(key, path, name, copy, originals[name], False)


def _floating(module: nn.Module) -> dict[str, torch.Tensor]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {path: tensor for path, tensor in named if tensor.is_floating_point()}


class Besides:
    """Counts the entries that an adapter trains whatever is selected: biases, and modules in `modules_to_save`.

    Args:
        model: The model, whose modules to save may be wrapped later.
        adapter: Name of the adapter.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._adapter = adapter
        self._known = 0

    def __call__(self) -> int:
        """Return their number."""
        model = self._model()
        if model is not None:
            found = {
                id(each.value): each.value.numel()  # once, where several modules share it
                for each in trained_tensors(model, self._adapter)
                if isinstance(each.value, nn.Parameter) and each.name != "dps_weight"
            }
            self._known = sum(found.values())
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": self(), "_adapter": self._adapter, "_model": _gone}  # a copy trains as many


def _gone() -> None:
    """Stand in for the reference to a model."""
