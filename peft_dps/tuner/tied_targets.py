"""Weights that several modules share, such as tied embeddings: what an adapter may do with them."""

from __future__ import annotations

import logging

from torch import nn

from peft_dps.errors import TargetError
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.peft_interface import ModulesToSaveWrapper

logger = logging.getLogger(__name__)


def check_ties(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that would train a shared weight twice or in one place of several, unnoticed.

    In compact storage no weight is written, so that targets may share theirs.
    """
    layers = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, DPSLayer) and module.trained(adapter_name) is not None
    }
    copies = {key: layer for key, layer in layers.items() if adapter_name in layer.dps_weight}
    targets: dict[int, str] = {}
    for key, layer in copies.items():
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
            if target in copies:
                raise TargetError(
                    f"The target {target!r} is the same module as {key!r}, and only the first of the two would be "
                    "trained. Leave it out with `exclude_modules`, or make the second a module of its own."
                )
            logger.warning(
                "Adapter %r: the target %r is the same module as %r, which computes without the adapter. Make it a "
                "module of its own if it is to have one.",
                adapter_name,
                target,
                key,
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


def tie_saved_modules(model: nn.Module, adapter_name: str) -> None:
    """Share the parameters of copies in `modules_to_save` as the originals share theirs, such as tied embeddings."""
    first: dict[int, nn.Parameter] = {}
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            copy = wrapper.modules_to_save[adapter_name]
            for path, original in wrapper.original_module.named_parameters():
                parent, _, name = path.rpartition(".")
                shared = first.setdefault(id(original), copy.get_parameter(path))
                setattr(copy.get_submodule(parent), name, shared)
