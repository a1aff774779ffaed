"""What a state dict holds for an adapter: checked and unpacked before anything of it reaches the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_dps.errors import AdapterFileError
from peft_dps.tensors.packed import is_packed, unpack
from peft_dps.tuner.layers.layer import DPSLayer

logger = logging.getLogger(__name__)
_OWN = (".dps_weight.", ".dps_bias.")
_SHOWN = 3


def own_tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Go through an adapter's trained copies in DPS layers.

    Args:
        model: A PEFT model, or any module that holds DPS layers.
        adapter: Name of the adapter.

    Yields:
        The name in the model's state dict, the trained copy, and the pretrained tensor.
    """
    for key, layer in model.named_modules():
        if isinstance(layer, DPSLayer) and adapter in layer.dps_weight:
            prefix = f"{key}." if key else ""
            # Wherever W0 is now: while an adapter is loaded its copies may have no device yet.
            weight, bias = layer.pretrained_parameter.data, layer.pretrained()[1]
            yield f"{prefix}dps_weight.{adapter}", layer.dps_weight[adapter], weight
            if adapter in layer.dps_bias and bias is not None:
                yield f"{prefix}dps_bias.{adapter}", layer.dps_bias[adapter], bias


def saved_tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Go through an adapter's copies of `modules_to_save` like `own_tensors`: parameters only."""
    for key, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            originals = dict(wrapper.original_module.named_parameters(remove_duplicate=False))
            copies = wrapper.modules_to_save[adapter].named_parameters(remove_duplicate=False)
            prefix = f"{key}." if key else ""
            for name, copy in copies:
                yield f"{prefix}modules_to_save.{adapter}.{name}", copy, originals[name]


def read_state(model: nn.Module, adapter: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Check that a state dict holds exactly an adapter's tensors, and unpack those that are packed.

    Args:
        model: The model that the adapter is in.
        adapter: Name of the adapter.
        state: The state dict, by the model's own names.

    Returns:
        The state dict to load.

    Raises:
        AdapterFileError: If a tensor of a DPS layer is missing, superfluous, of another shape, or no weight, or if a
            packed tensor is altered or made against another base model.
    """
    own = {key: (copy, pretrained) for key, copy, pretrained in own_tensors(model, adapter)}
    saved = {key: (copy, pretrained) for key, copy, pretrained in saved_tensors(model, adapter)}
    _refuse("lacks", sorted(own.keys() - state.keys()), adapter)
    ours = {key for key in state if any(part in f"{key}." for part in _OWN)}
    _refuse("has, without a place in the model,", sorted(ours - own.keys()), adapter)
    restored = dict(state)
    for key, (copy, pretrained) in {**own, **saved}.items():
        if key not in state:
            continue
        tensor = state[key]
        if is_packed(tensor) and copy.is_floating_point():
            restored[key] = _unpack(key, tensor, pretrained)
        if key in own:
            _check_weight(key, restored[key], copy)
    unknown = sorted(state.keys() - _known(model))
    if unknown:
        logger.warning("What is loaded for adapter %r has tensors that the model lacks: %s.", adapter, _some(unknown))
    return restored


def require_saved_shapes(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Check the shapes of what is about to be loaded into copies of `modules_to_save`.

    torch finds a wrong shape too, but only after it has loaded everything else.

    Args:
        own: State dict of a module that holds such copies.
        state: The state dict to load.
        prefix: What names in `state` have before the module's own.

    Raises:
        AdapterFileError: If a shape differs.
    """
    wrong = [
        f"{key} ({list(state[prefix + key].shape)} in place of {list(tensor.shape)})"
        for key, tensor in own.items()
        if ".modules_to_save." in key and prefix + key in state and state[prefix + key].shape != tensor.shape
    ]
    if wrong:
        raise AdapterFileError(
            f"There is a size mismatch for {_some(wrong)}. Make the base model as it was in training, with the same "
            "number of labels for instance, or pass `ignore_mismatched_sizes=True` to leave these out."
        )


def take_out(tuner: BaseTuner, adapter: str) -> None:
    """Remove an adapter that was put into a model to be loaded, and could not be.

    Args:
        tuner: The tuner's model, as PEFT's `PeftModel.base_model`.
        adapter: Name of the adapter.
    """
    tuner.delete_adapter(adapter)
    model = tuner.model
    for key, module in reversed(list(model.named_modules())):  # the inner ones first
        if isinstance(module, DPSLayer) and not module.dps_weight:
            model.set_submodule(key, module.unload_and_optionally_merge_module(False, False, None))
        elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            model.set_submodule(key, module.original_module)


def _unpack(key: str, tensor: torch.Tensor, pretrained: torch.Tensor) -> torch.Tensor:
    try:
        return unpack(tensor, pretrained)
    except AdapterFileError as error:
        raise AdapterFileError(f"The packed tensor {key!r} cannot be loaded: {error}") from error


def _check_weight(key: str, tensor: torch.Tensor, copy: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise AdapterFileError(f"The tensor {key!r} is no weight: its dtype is {tensor.dtype}.")
    if tensor.shape != copy.shape:
        raise AdapterFileError(
            f"The tensor {key!r} has the shape {list(tensor.shape)}, the model's is {list(copy.shape)}. Load the "
            "adapter onto the base model that it was trained on."
        )


def _refuse(what: str, keys: list[str], adapter: str) -> None:
    if keys:
        raise AdapterFileError(
            f"What is loaded for adapter {adapter!r} {what} {len(keys)} tensors: {_some(keys)}. Load the adapter "
            "with its own config, onto the base model that it was trained on."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _known(model: nn.Module) -> set[str]:
    keys = set(model.state_dict().keys())
    return keys | {f"base_model.model.{key}" for key in keys}
