"""What a state dict holds for an adapter: checked and decoded before anything of it reaches the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from peft_dps.errors import AdapterFileError
from peft_dps.tensors.difference import decode, is_encoded
from peft_dps.tuner.trained_tensors import TrainedTensor, trained_tensors

logger = logging.getLogger(__name__)
_OF_LAYERS = (".dps_weight.", ".dps_bias.")
_SHOWN = 3


def read_state(model: nn.Module, adapter: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Check that a state dict holds exactly an adapter's tensors, and decode those that are differences."""
    tensors = {tensor.key: tensor for tensor in trained_tensors(model, adapter)}
    needed = {key for key, tensor in tensors.items() if tensor.in_layer}
    _refuse("lacks", sorted(needed - state.keys()), adapter)
    given = {key for key in state if any(part in f"{key}." for part in _OF_LAYERS)}
    _refuse("has, without a place in the model,", sorted(given - needed), adapter)
    restored = {key: _read_tensor(key, tensor, tensors.get(key)) for key, tensor in state.items()}
    keys = model.state_dict().keys()
    unknown = sorted(state.keys() - keys - {f"base_model.model.{key}" for key in keys})
    if unknown:
        logger.warning("What is loaded for adapter %r has tensors that the model lacks: %s.", adapter, _some(unknown))
    return restored


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
