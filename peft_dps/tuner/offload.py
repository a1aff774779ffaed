"""Pretrained weights that a training hardly needs: in files instead of memory."""

from __future__ import annotations

import logging
from collections import Counter

from torch import nn
from torch.distributed.tensor import DTensor

from peft_dps.tensors.file import on_disk
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.peft_interface import ModulesToSaveWrapper

logger = logging.getLogger(__name__)


def offload_bases(model: nn.Module, adapter_name: str) -> None:
    """Keep the pretrained weights of an adapter's layers in files, but for those that other modules share."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for key, module in model.named_modules():
        if isinstance(module, DPSLayer) and adapter_name in module.dps_weight:
            if uses[id(module.pretrained_parameter)] > 1:
                logger.warning("`offload_base` leaves the weight of %r in memory: another module shares it.", key)
            else:
                module.offload_base()


def offload_originals(model: nn.Module) -> None:
    """Keep the pretrained weights of modules that are trained in full (`modules_to_save`) in files, on a CPU."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.original_module.parameters():
                if parameter.device.type == "cpu" and not isinstance(parameter, DTensor):
                    parameter.data = on_disk(parameter.data)
