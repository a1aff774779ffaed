"""What a state dict holds for an adapter: checked and decoded before anything of it reaches the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from peft_dps.errors import AdapterFileError
from peft_dps.masking.compact.delta import NONE, Delta, set_values
from peft_dps.tensors.difference import decode, is_encoded
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.trained_tensors import TrainedTensor, trained_tensors

logger = logging.getLogger(__name__)
_OF_LAYERS = (".dps_weight.", ".dps_delta.", ".dps_bias.")
_SHOWN = 3


def read_state(model: nn.Module, adapter: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Check that a state dict holds exactly an adapter's tensors, and decode those that are differences."""
    tensors = {tensor.key: tensor for tensor in trained_tensors(model, adapter)}
    needed = {key for key, tensor in tensors.items() if tensor.in_layer}
    deltas = {
        f"{path}.dps_delta.{adapter}": delta
        for path, module in model.named_modules()
        if isinstance(module, DPSLayer) and (delta := module.delta(adapter)) is not None
    }
    needed |= {f"{path}.{name}" for path in deltas for name in ("weight", "index")}
    given = {key for key in state if any(part in f"{key}." for part in _OF_LAYERS)}
    kept = {f"{path}.{name}" for path in deltas for name in ("kept_weight", "kept_index")}
    try:
        _refuse("lacks", sorted(needed - state.keys()), adapter)
        _refuse("has, without a place in the model,", sorted(given - needed - kept), adapter)
        for path, delta in deltas.items():
            check_units(path, delta, state)
        restored = {key: _read_tensor(key, tensor, tensors.get(key)) for key, tensor in state.items()}
    except AdapterFileError:
        for delta in deltas.values():
            made = delta.kept_index is not None and bool((delta.kept_index == NONE).any())  # by `expect_kept_units`
            if made:
                delta.resize(delta.slots)
        raise
    for path, delta in deltas.items():
        kept_units = state.get(f"{path}.kept_index")
        delta.resize(len(state[f"{path}.index"]), 0 if kept_units is None else len(kept_units))
    keys = model.state_dict().keys()
    unknown = sorted(state.keys() - keys - {f"base_model.model.{key}" for key in keys})
    if unknown:
        logger.warning("What is loaded for adapter %r has tensors that the model lacks: %s.", adapter, _some(unknown))
    return restored


def remember_units(model: nn.Module, adapter: str) -> Callable[[], None]:
    """Return a function that gives compact layers back the units that they hold now."""
    deltas = [layer.delta(adapter) for layer in model.modules() if isinstance(layer, DPSLayer)]
    held = [
        (delta, delta.weight.data, delta.index, delta.kept_weight, delta.kept_index)
        for delta in deltas
        if delta is not None
    ]

    def restore() -> None:
        for delta, weight, index, kept_weight, kept_index in held:
            set_values(delta.weight, weight)
            delta.index, delta.kept_weight, delta.kept_index = index, kept_weight, kept_index

    return restore


def expect_kept_units(model: nn.Module, adapter: str, state: Mapping[str, torch.Tensor]) -> None:
    """Let layers have units that are not trained any more where a file has them: PEFT goes by the names of a model."""
    for path, module in model.named_modules():
        delta = module.delta(adapter) if isinstance(module, DPSLayer) else None
        in_file = any(key.endswith(f"{path}.dps_delta.kept_index") for key in state)
        if delta is not None and delta.kept is None and in_file:
            delta.resize(delta.slots, 1)


def check_units(path: str, delta: Delta, state: Mapping[str, torch.Tensor]) -> None:
    """Check the units that a state dict holds for a layer."""
    values, index = state[f"{path}.weight"], state[f"{path}.index"]
    kept_values, kept_index = state.get(f"{path}.kept_weight"), state.get(f"{path}.kept_index")
    kept = index[:0] if kept_index is None else kept_index
    held = torch.cat([index, kept]) if index.dtype == kept.dtype and index.dim() == kept.dim() == 1 else None
    waits = held is not None and bool((held == NONE).all())
    if held is None or held.dtype is not torch.int32:
        problem = f"`index` is {index.dtype} {list(index.shape)}, and has to be a list of int32"
    elif not waits and bool(((held < 0) | (held >= delta.units.count)).any()):
        problem = f"`index` names units that the layer lacks, which has {delta.units.count}"
    elif not waits and len(held.unique()) != len(held):
        problem = "`index` names a unit twice"
    elif (kept_values is None) is not (kept_index is None):
        problem = "it lacks one of `kept_weight` and `kept_index`"
    else:
        parts = [(values, len(index))] if kept_values is None else [(values, len(index)), (kept_values, len(kept))]
        wrong = [own for own, many in parts if own.shape != delta.shape_of(many) or not own.is_floating_point()]
        if not wrong:
            return
        problem = f"its values are {wrong[0].dtype} {list(wrong[0].shape)}"
    raise AdapterFileError(
        f"What is loaded for {path!r} does not fit the layer: {problem}. Load the adapter with its own config, onto "
        "the base model that it was trained on."
    )


def require_saved_shapes(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Check the shapes of what is about to be loaded into copies of `modules_to_save`.

    torch finds a wrong shape too, but only after it has loaded everything else.
    """
    wrong = [
        f"{key} ({list(state[key].shape)} in place of {list(tensor.shape)})"
        for key, tensor in own.items()
        if ".modules_to_save." in key and key in state and state[key].shape != tensor.shape
    ]
    if wrong:
        raise AdapterFileError(
            f"There is a size mismatch for {_some(wrong)}. Make the base model as it was in training, with the same "
            "number of labels for instance, or pass `ignore_mismatched_sizes=True` to leave these out."
        )


def _read_tensor(key: str, tensor: torch.Tensor, trained: TrainedTensor | None) -> torch.Tensor:
    if trained is None:
        return tensor
    if is_encoded(tensor):
        try:
            tensor = decode(tensor, trained.pretrained)
        except AdapterFileError as error:
            raise AdapterFileError(f"The difference {key!r} cannot be loaded: {error}") from error
    if trained.in_layer and not tensor.is_floating_point():
        raise AdapterFileError(f"The tensor {key!r} is no weight: its dtype is {tensor.dtype}.")
    if trained.in_layer and tensor.shape != trained.value.shape:
        raise AdapterFileError(
            f"The tensor {key!r} has the shape {list(tensor.shape)}, the model's is {list(trained.value.shape)}. Load "
            "the adapter onto the base model that it was trained on."
        )
    return tensor


def _refuse(what: str, keys: list[str], adapter: str) -> None:
    if keys:
        raise AdapterFileError(
            f"What is loaded for adapter {adapter!r} {what} {len(keys)} tensors: {_some(keys)}. Load the adapter "
            "with its own config, onto the base model that it was trained on."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
