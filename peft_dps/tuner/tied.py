"""Weights that several modules share, such as tied embeddings: what an adapter may do with them."""

from __future__ import annotations

import logging
from collections import Counter

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dps.errors import TargetError
from peft_dps.tensors.file import on_disk
from peft_dps.tuner.layers.layer import DPSLayer

logger = logging.getLogger(__name__)


def check_ties(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that would train a shared weight twice or in one place of several, unnoticed.

    Args:
        model: The model, with the adapter's layers in it.
        adapter_name: Name of the adapter.

    Raises:
        TargetError: If two targets share a weight, or a target is in the model under another path, too.
    """
    layers = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, DPSLayer) and adapter_name in module.dps_weight
    }
    targets: dict[int, str] = {}
    for key, layer in layers.items():
        other = targets.setdefault(id(layer.pretrained_parameter), key)
        if other != key:
            raise TargetError(
                f"The targets {other!r} and {key!r} share one weight, of which DPS would train two copies that come "
                "apart. Leave one of them out with `exclude_modules`: the other is then trained as a copy of its own. "
                "Or leave out both and set `train_remaining=True`, which trains them in full and keeps them tied."
            )
    wrapped = {id(layer.get_base_layer()): key for key, layer in layers.items()}
    for key, module in model.named_modules(remove_duplicate=False):
        target = wrapped.get(id(module))
        if target is not None and not key.startswith(f"{target}."):
            raise TargetError(
                f"The target {target!r} is the same module as {key!r}, and only the first of the two would be "
                "trained. Leave it out with `exclude_modules`, or make the second a module of its own."
            )
        for parameter in () if target is not None else module._parameters.values():
            if id(parameter) in targets:
                logger.warning(
                    "Adapter %r: the weight of the target %r is shared with %r, which is no target. Only the copy in "
                    "the target is trained, and merging unties the two.",
                    adapter_name,
                    targets[id(parameter)],
                    key,
                )


def offload_bases(model: nn.Module, adapter_name: str) -> None:
    """Keep the pretrained weights of an adapter's layers in files, but for those that other modules need in each step.

    Args:
        model: The model, with the adapter's layers in it.
        adapter_name: Name of the adapter.
    """
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for key, module in model.named_modules():
        if isinstance(module, DPSLayer) and adapter_name in module.dps_weight:
            if uses[id(module.pretrained_parameter)] > 1:
                logger.warning("`offload_base` leaves the weight of %r in memory: another module shares it.", key)
            else:
                module.offload_base()


def offload_originals(model: nn.Module) -> None:
    """Keep the pretrained weights of modules that are trained in full (`modules_to_save`) in files, on a CPU.

    Args:
        model: The model, with PEFT's wrappers around such modules.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.original_module.parameters():
                if parameter.device.type == "cpu" and not isinstance(parameter, DTensor):
                    parameter.data = on_disk(parameter.data)
