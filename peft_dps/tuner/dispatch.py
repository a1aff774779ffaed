"""Which layer takes the place of a module, or why none can."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from peft_dps.errors import ConfigError, TargetError
from peft_dps.tensors.split import split_of
from peft_dps.training.recipe import Recipe
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.conv import Conv1d, Conv2d, Conv3d
from peft_dps.tuner.layers.embedding import Embedding, computes_alike
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.layers.linear import Conv1DLinear, Linear
from peft_dps.tuner.layers.parameter import ParamWrapper, find_wrapper, path_in_base
from peft_dps.tuner.layers.pretrained import UnreadWeight, device_of, is_offloaded
from peft_dps.tuner.peft_interface import BaseTunerLayer
from peft_dps.tuner.quantized import is_quantized, linear_shape, remedy_for_quantized, stored_as
from peft_dps.tuner.targets import is_target

LAYER_TYPES: dict[type[nn.Module], type[DPSLayer]] = {
    nn.Linear: Linear,
    Conv1D: Conv1DLinear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Embedding: Embedding,
}


def make_layer(target: nn.Module, key: str, recipe: Recipe, model: nn.Module) -> DPSLayer:
    """Wrap a module of a model in the layer of its kind."""
    _check_unwrapped(target, key)
    _check_parallel(target, key, recipe, model)
    base_cls = _base_class(target)
    if not recipe.reads_base:
        called_as = base_cls or (None if linear_shape(target) is None else nn.Linear)
        why = None if called_as is None else _why_unread(target, called_as)
        if called_as is not None and why is not None:
            return _make_unread(target, called_as, key, why)
    _check_dtype(target, "weight", key, recipe)
    if base_cls is None:
        supported = ", ".join(base_cls.__name__ for base_cls in LAYER_TYPES)
        raise _unknown(target, key, f"it supports {supported}")
    _check_loaded(target, "weight", key)
    if isinstance(target, nn.Embedding):
        _check_embedding(target, key)
    elif not _computes_as(target, base_cls):
        raise _unknown(target, key, f"its forward is not that of {base_cls.__name__}")
    return LAYER_TYPES[base_cls](target)


def _why_unread(target: nn.Module, base_cls: type[nn.Module]) -> str | None:
    """Tell why nothing may read the weight of a module that can be called all the same; None if it is to be read."""
    is_linear = base_cls in (nn.Linear, Conv1D)
    computes = _computes_as(target, base_cls)
    if is_quantized(target):
        return f"its weight is quantized ({stored_as(target)})" if is_linear else None
    if is_offloaded(target):
        return "its weight is offloaded" if is_linear or computes else None
    if not is_linear:
        return None
    if isinstance(target._parameters.get("weight"), DTensor):
        return "its weight is split over processes (tensor parallelism)"
    if "weight" not in target._parameters:
        return "its weight is computed from other parameters"
    return None if computes else f"its forward is not that of {base_cls.__name__}"


def _make_unread(target: nn.Module, base_cls: type[nn.Module], key: str, why: str) -> DPSLayer:
    """Wrap a module that can be called, whose weight nothing may read."""
    stored, weight = target._parameters.get("weight"), getattr(target, "weight", None)
    if device_of(target).type == "meta" or isinstance(stored, nn.UninitializedParameter):
        raise _not_loaded(key)
    if isinstance(target, nn.Embedding):
        _check_embedding(target, key)
    shape = linear_shape(target) if base_cls is nn.Linear else None
    dtype = torch.float32
    if isinstance(weight, torch.Tensor) and not is_quantized(target):
        shape, dtype = shape or tuple(weight.shape), weight.dtype
    if shape is None:
        raise _not_loaded(key)
    return LAYER_TYPES[base_cls](target, UnreadWeight(shape, dtype, why))


def _check_parallel(target: nn.Module, key: str, recipe: Recipe, model: nn.Module) -> None:
    """Check that a weight which is cut over processes is one beside which a method can train."""
    weight: torch.Tensor | None = target._parameters.get("weight")
    if not isinstance(weight, DTensor):
        if getattr(target, "_hf_tp_plan", None) is not None:  # a plain tensor, which does not tell what it is part of
            raise TargetError(
                f"The target {key!r} was split by the tensor parallelism of an older transformers. DPS supports that "
                "of transformers 5.17 and newer: upgrade it, or leave the module out with `exclude_modules`."
            )
        return
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise _not_loaded(key)
    if recipe.reads_base or not isinstance(target, nn.Linear):
        raise TargetError(
            f"The weight of the target {key!r}, a {type(target).__name__}, is split over processes (tensor "
            "parallelism). DPS supports compact columns and rows of `nn.Linear` there (`storage='compact'`, "
            "`granularity='column'` or 'row'); leave other modules out with `exclude_modules`."
        )
    split_of(weight)


def _base_class(target: nn.Module) -> type[nn.Module] | None:
    return next((base for base in LAYER_TYPES if isinstance(target, base)), None)


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


def wrap_parameter(target: nn.Module, parameter_name: str, key: str, recipe: Recipe) -> ParamWrapper:
    """Wrap a module to train one of its parameters, or find the wrapper that is there already."""
    wrapper = find_wrapper(target, parameter_name)
    if wrapper is not None:
        return wrapper
    module = target
    while isinstance(module, ParamWrapper):
        module = module.base_layer
    _check_unwrapped(module, key)
    _check_dtype(module, parameter_name, key, recipe)
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
    """Check that a layer has the rows or columns, or the values, that a method asks for."""
    if layer.unread is not None and recipe.reads_base:  # by an adapter that has only called it so far
        storage, granularity = _storage_of(recipe)
        raise TargetError(
            f"The target {key!r} can be called only: {layer.unread}. `storage={storage!r}` with "
            f"`granularity={granularity!r}` computes with the values of the weight: use `storage='compact'` with "
            "`granularity='column'` or 'row', or leave it out with `exclude_modules`."
        )
    layout = layer.layout
    units = recipe.granularity.units(layout)
    without_units = units is None
    if without_units or (recipe.noise.substitutes and recipe.noise.units(layout) is None):
        field = "granularity='entry'" if without_units else "variant='dense'"
        raise TargetError(
            f"The parameter {key!r} has the shape {layout.shape}, and nothing tells which axis holds inputs, so that "
            f"it has no rows and columns. Use `{field}`, or leave it out of `target_parameters`."
        )
    if units is not None and not (recipe.scope.across or recipe.granularity.spans_weights):
        try:
            recipe.budget.count(units.count)
        except ConfigError as error:
            raise ConfigError(f"The target {key!r}: {error}") from error


def check_mergeable(model: nn.Module, adapter_names: list[str]) -> None:
    """Check that each layer can take in adapters, before any of them has."""
    for module in model.modules():
        if isinstance(module, DPSLayer):
            module.check_mergeable(adapter_names)


def _check_unwrapped(target: nn.Module, key: str) -> None:
    if isinstance(target, BaseTunerLayer):
        raise TargetError(
            f"The target {key!r} is already wrapped by another tuner ({type(target).__module__}). Unload that adapter "
            "first, or leave the module out with `exclude_modules`."
        )


def _check_dtype(target: nn.Module, name: str, key: str, recipe: Recipe) -> None:
    if not is_quantized(target, name):
        return
    remedy = remedy_for_quantized(*_storage_of(recipe))
    if not recipe.reads_base:
        remedy = "Only linear layers may be: leave it out with `exclude_modules`, or load it without quantization."
    raise TargetError(f"The weight of the target {key!r} is quantized ({stored_as(target, name)}). {remedy}")


def _storage_of(recipe: Recipe) -> tuple[str, str]:
    return recipe.settings.get("storage", "copy"), recipe.settings.get("granularity", "entry")


def _check_loaded(target: nn.Module, name: str, key: str) -> None:
    parameter = target._parameters.get(name)
    if parameter is None:
        raise TargetError(
            f"The weight of the target {key!r} is computed from other parameters (torch.nn.utils.parametrize or "
            "weight_norm), so it cannot be trained itself. Remove the parametrization, or leave the module out with "
            "`exclude_modules`."
        )
    if is_offloaded(target):
        raise TargetError(
            f"The target {key!r} is offloaded (its place in `device_map` is 'disk', or 'cpu' beside a GPU), so its "
            "weight is there only during a forward, and no optimizer could update a copy of it. Load the model "
            "without offloading, or use `storage='compact'` with `granularity='column'` or 'row', which only call it."
        )
    lazy = isinstance(parameter, nn.UninitializedParameter)
    if lazy or parameter.device.type == "meta" or parameter.numel() == 0 or isinstance(parameter, DTensor):
        raise _not_loaded(key)


def _not_loaded(key: str) -> TargetError:
    return TargetError(
        f"The weight of the target {key!r} is empty, on the meta device or sharded, so there is nothing to copy. "
        "Add the adapter to the fully loaded model, before it is sharded (FSDP, ZeRO-3) or dispatched. "
        "`PeftModel.from_pretrained` takes accelerate's hooks off an offloaded model: use `get_peft_model` with "
        "`storage='compact'`, and `load_adapter`."
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
