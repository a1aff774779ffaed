"""Which layer takes the place of a module, or why none can."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from peft_dps.errors import TargetError
from peft_dps.recipes import Recipe
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.conv import Conv1d, Conv2d, Conv3d
from peft_dps.tuner.layers.embedding import Embedding, computes_alike
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.layers.linear import Conv1DLinear, Linear
from peft_dps.tuner.layers.parameter import ParamWrapper, find_wrapper, path_in_base
from peft_dps.tuner.targets import is_packed, is_target

LAYER_TYPES: dict[type[nn.Module], type[DPSLayer]] = {
    nn.Linear: Linear,
    Conv1D: Conv1DLinear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Embedding: Embedding,
}
TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def make_layer(target: nn.Module, key: str) -> DPSLayer:
    """Wrap a module in the layer of its kind."""
    _check_unwrapped(target, key)
    _check_dtype(target, "weight", key)
    base_cls = next((base for base in LAYER_TYPES if isinstance(target, base)), None)
    if base_cls is None:
        supported = ", ".join(base_cls.__name__ for base_cls in LAYER_TYPES)
        raise _unknown(target, key, f"it supports {supported}")
    _check_loaded(target, "weight", key)
    if isinstance(target, nn.Embedding):
        _check_embedding(target, key)
    elif not _computes_as(target, base_cls):
        raise _unknown(target, key, f"its forward is not that of {base_cls.__name__}")
    return LAYER_TYPES[base_cls](target)


def check_reach(config: DPSConfig, model: nn.Module) -> None:
    """Check that nothing of a new adapter lies within a module of which another adapter trains parameters.

    PEFT looks for targets outside of layers that other adapters have made, and would leave these out in silence.
    """
    wrapped = [key for key, module in model.named_modules() if isinstance(module, ParamWrapper)]
    if wrapped and config.train_remaining:
        raise TargetError(
            f"`train_remaining=True` cannot be for another adapter of this model: {wrapped[0]!r} holds parameters "
            "that an adapter has in `target_parameters`. List `modules_to_save`, or unload that adapter first."
        )
    inside = tuple(f"{key}." for key in wrapped)
    for key, module in model.named_modules():
        if not key.startswith(inside) or not isinstance(module, (DPSLayer, *LAYER_TYPES)):
            continue
        own = path_in_base(model, key)
        if not isinstance(module, ParamWrapper) and is_target(config, own):
            raise TargetError(
                f"The target {own!r} cannot be for another adapter of this model: it lies in a module that holds "
                "parameters which an adapter has in `target_parameters`. Leave it out with `exclude_modules`, or "
                "unload that adapter first."
            )


def wrap_parameter(target: nn.Module, parameter_name: str, key: str) -> ParamWrapper:
    """Wrap a module to train one of its parameters, or find the wrapper that is there already."""
    wrapper = find_wrapper(target, parameter_name)
    if wrapper is not None:
        return wrapper
    module = target
    while isinstance(module, ParamWrapper):
        module = module.base_layer
    _check_unwrapped(module, key)
    _check_dtype(module, parameter_name, key)
    _check_loaded(module, parameter_name, key)
    if getattr(module, parameter_name).dim() == 0:
        raise TargetError(
            f"The parameter {key!r} is a single number, which has no entries to choose from. Leave it out of "
            "`target_parameters`; `modules_to_save` or `train_remaining` trains the module that holds it."
        )
    return ParamWrapper(target, parameter_name, key)


def _unknown(target: nn.Module, key: str, why: str) -> TargetError:
    return TargetError(
        f"The target {key!r} is a {type(target).__name__}, which DPS cannot train: {why}. Leave it out with "
        "`exclude_modules`, or train it in full with `modules_to_save`."
    )


def check_layout(layer: DPSLayer, recipe: Recipe, key: str) -> None:
    """Check that a layer has the rows or columns that a method asks for."""
    layout = layer.layout
    without_units = recipe.granularity.units(layout) is None
    if without_units or (recipe.noise.substitutes and layout.columns is None):
        field = "granularity='entry'" if without_units else "variant='dense'"
        raise TargetError(
            f"The parameter {key!r} has the shape {layout.shape}, and nothing tells which axis holds inputs, so that "
            f"it has no rows and columns. Use `{field}`, or leave it out of `target_parameters`."
        )


def _check_unwrapped(target: nn.Module, key: str) -> None:
    if isinstance(target, BaseTunerLayer):
        raise TargetError(
            f"The target {key!r} is already wrapped by another tuner ({type(target).__module__}). Unload that adapter "
            "first, or leave the module out with `exclude_modules`."
        )


def _check_dtype(target: nn.Module, name: str, key: str) -> None:
    weight = getattr(target, name, None)
    dtype = weight.dtype if isinstance(weight, torch.Tensor) else "packed"
    if is_packed(target) or (isinstance(weight, torch.Tensor) and _is_quantized(weight)):
        raise TargetError(
            f"The weight of the target {key!r} is quantized ({type(target).__name__}, {dtype}). DPS trains "
            "full-precision weights: load the model without quantization, or use LoRA on a quantized model."
        )


def _check_loaded(target: nn.Module, name: str, key: str) -> None:
    parameter = target._parameters.get(name)
    if parameter is None:
        raise TargetError(
            f"The weight of the target {key!r} is computed from other parameters (torch.nn.utils.parametrize or "
            "weight_norm), so it cannot be trained itself. Remove the parametrization, or leave the module out with "
            "`exclude_modules`."
        )
    if getattr(getattr(target, "_hf_hook", None), "offload", False):
        raise TargetError(
            f"The target {key!r} is offloaded (its place in `device_map` is 'disk', or 'cpu' beside a GPU), so its "
            "weight is there only during a forward, and no optimizer could update a copy of it. Load the model "
            "without offloading."
        )
    lazy = isinstance(parameter, nn.UninitializedParameter)
    if lazy or parameter.device.type == "meta" or parameter.numel() == 0 or isinstance(parameter, DTensor):
        raise TargetError(
            f"The weight of the target {key!r} is empty, on the meta device or sharded, so there is nothing to copy. "
            "Add the adapter to the fully loaded model, before it is sharded (FSDP, ZeRO-3) or dispatched."
        )


def _check_embedding(target: nn.Embedding, key: str) -> None:
    if target.max_norm is not None:
        raise TargetError(
            f"The target {key!r} has max_norm={target.max_norm}, with which a forward writes into the weight, so that "
            "frozen entries would move. Set its `max_norm` to None, or leave it out with `exclude_modules`."
        )
    if target.sparse:
        raise TargetError(
            f"The target {key!r} has sparse=True, and DPS needs dense gradients. Set its `sparse` to False, or leave "
            "it out with `exclude_modules`."
        )
    if not computes_alike(target):
        raise _unknown(target, key, "its forward is neither that of Embedding nor that times a constant `embed_scale`")


def _computes_as(target: nn.Module, base_cls: type[nn.Module]) -> bool:
    """Tell whether a subclass leaves the computation alone; if not, replacing it would change the model."""
    return all(
        getattr(type(target), name, None) is getattr(base_cls, name, None) for name in ("forward", "_conv_forward")
    )


def _is_quantized(weight: torch.Tensor) -> bool:
    # torchao's weights are tensor subclasses of a floating dtype; bitsandbytes' are parameters with a state.
    if isinstance(weight, nn.UninitializedParameter):
        return False
    subclass = type(weight.data) is not torch.Tensor and not isinstance(weight, DTensor)
    stored = weight.dtype not in TRAINABLE_DTYPES
    return stored or subclass or any(hasattr(weight, name) for name in ("quant_state", "SCB"))
