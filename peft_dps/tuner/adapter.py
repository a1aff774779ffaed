"""The DPS adapters in a model, by name: what they are doing, and their training state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_dps.checkpoint import saving
from peft_dps.checkpoint.state import load_state, state_of
from peft_dps.errors import ConfigError
from peft_dps.training.batch_scoring import awaits_scores, scoring_batches
from peft_dps.training.controller import Controller
from peft_dps.training.status import DPSStatus, status_of
from peft_dps.tuner.examples import examples_of
from peft_dps.tuner.layers.layer import DPSLayer


class DPSAdapter:
    """One DPS adapter of a model: what it is doing, and its training state; `dps_adapter` finds it.

    Args:
        controller: What drives its training.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def status(self) -> DPSStatus:
        """Tell what DPS is doing: cycle, stage, entries selected per layer, and whether a frozen entry moved."""
        return status_of(self._controller)

    @property
    def awaits_scores(self) -> bool:
        """Whether batches are to be scored before training: `schedule="once"` with `score_steps=0`, and not done."""
        return awaits_scores(self._controller)

    def masks(self) -> dict[str, torch.Tensor]:
        """Return the masks that hold now.

        Returns:
            Per path of a layer, a bool tensor of the weight's shape (or of this process's rows of it), True where
            entries are updated. A layer that has selected nothing, or whose copy is updated entirely, has none.
        """
        masks = {weight.name: weight.entry_mask() for weight in self._controller.existing}
        return {name: mask for name, mask in masks.items() if mask is not None}

    def set_total_steps(self, total_steps: int) -> None:
        """Begin a training of so many optimizer steps: a fractional `stage_steps` refers to them.

        The phases start anew. With the HF Trainer there is no need to call this.

        Args:
            total_steps: Number of optimizer steps of the whole training, at least 2.

        Raises:
            ConfigError: If the number is no integer or too small.
        """
        if type(total_steps) is not int or total_steps < 2:
            raise ConfigError(f"`total_steps` must be an integer of at least 2, got {total_steps!r}.")
        self._controller.restart(total_steps)

    def check_ranks_agree(self) -> None:
        """Compare steps, masks and weights over all processes of a distributed training; all of them have to call it.

        With the environment variable `PEFT_DPS_CHECK_RANKS=1` that happens at every change of phase. It reads every
        weight and communicates 32 bytes for each, so it is meant for finding mistakes. Of weights that FSDP2 has cut,
        processes that hold the same rows are compared.

        Raises:
            EngineError: On all processes, if any two differ.
        """
        self._controller.check_ranks_agree()

    def state_dict(self) -> dict[str, Any]:
        """Take down the training state: what an exact resume needs besides weights, optimizer and random state.

        It is the same on all processes of a data-parallel training. Where FSDP2 has sharded the weights, it is that of
        the rows that the process has.

        Returns:
            `"header"`, plain values fit for JSON, and `"tensors"`, a flat dict of tensors: evidence, or masks in bits.
            They are those in use, as in torch's state dicts: copy what has to outlive the next step.
        """
        return state_of(self._controller)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the training was whose state was taken down: every later weight and mask has the same bits.

        Load the adapter's weights first. Everything is checked before anything is changed. Where FSDP2 has sharded the
        weights, all processes have to call it, each with the state of the same rows.

        Args:
            state: What `state_dict` returned.

        Raises:
            StateError: If the state is not complete, or not that of this adapter, these settings and these weights.
        """
        load_state(self._controller, state)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Save the training state to a safetensors file.

        The file appears whole or not at all, also if the process is killed meanwhile. In a data-parallel training one
        process has to save. Where FSDP2 has sharded the weights, all have to call it, with the same path in a folder
        that they share: each writes a file beside it, and the one at `path` comes last and says which belong together.

        Args:
            path: Name of the file; its folder exists.

        Raises:
            StateError: If there is a folder of that name, or it failed on another process.
        """
        saving.save(self._controller, path)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Go on where the training was whose state is in a file; see `load_state_dict`.

        Every process loads, however many there are now and however many there were: a state can be cut anew, over
        another number of processes, over several from one, or put together for one.

        Args:
            path: Name of the file.

        Raises:
            StateError: If the file is missing or damaged, or not that of this adapter, these settings and weights.
        """
        saving.load(self._controller, path)

    def score(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], torch.Tensor],
        *,
        per_example: bool = False,
    ) -> None:
        """Gather evidence from batches before training, for `schedule="once"` with `score_steps=0`.

        Each batch counts as one step: its gradient is scored and thrown away, and nothing is updated. Where several
        processes train together, all of them call it, each with its own batches, which add up.

        Args:
            model: The model, in the mode (`train` or `eval`) in which its gradients are to be taken.
            batches: The batches.
            loss: Returns the loss of the model on a batch.
            per_example: Whether each example of a batch is scored by itself: a backward pass, and a step, for each.
                The squared gradients of a log-likelihood with the labels of the data then add up to the diagonal of
                the empirical Fisher information.

        Raises:
            ConfigError: If training has begun, evidence is gathered in training, there are no batches, or one has no
                loss or cannot be cut.
        """
        _require_batches(batches)
        scored = 0
        with scoring_batches(self._controller) as gather:
            try:
                for scored, batch in enumerate(examples_of(batches) if per_example else batches, 1):  # noqa: B007
                    model.zero_grad()
                    _require_loss(loss(model, batch)).backward()
                    gather()
            finally:
                model.zero_grad()
            if not scored:
                raise ConfigError(
                    f"`batches` holds no batch to score, got an empty {type(batches).__name__}. Give at least one; an "
                    "iterator that was used up before has to be made anew."
                )


def _require_batches(batches: Any) -> None:
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        one = " For a single batch give a list of one: `[batch]`." if isinstance(batches, Mapping) else ""
        raise ConfigError(
            f"`batches` must be batches to go through, such as a list, got {type(batches).__name__}.{one}"
        )


def _require_loss(value: Any) -> torch.Tensor:
    given = f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and value.requires_grad:
            return value
        given = f"a tensor of shape {list(value.shape)}, {'with' if value.requires_grad else 'without'} a gradient"
    raise ConfigError(
        f"`loss` must return the loss of a batch, a tensor of one entry that depends on what is trained, got {given}."
    )


def dps_adapter(model: nn.Module, adapter_name: str | None = None) -> DPSAdapter:
    """Find a DPS adapter in a model, also where the model is no `PeftModel` or is wrapped by an engine.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        adapter_name: Name of the adapter; None if there is only one.

    Raises:
        ConfigError: If there is no such adapter, several and none is named, or two of the same name.
    """
    return DPSAdapter(find_controller(model, adapter_name))


def unsharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Collect what FSDP2 is not to cut, for `fully_shard(ignored_params=...)`.

    That are pretrained weights that `offload_base=True` keeps in files, since what is cut is held in memory; and
    weights of which `scope="model"`, or whole weights and blocks, selected no unit, since torch cannot put together
    an empty tensor.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.

    Returns:
        The parameters.
    """
    layers = [module for module in model.modules() if isinstance(module, DPSLayer)]
    offloaded = {layer.pretrained_parameter for layer in layers if layer.is_offloaded}
    weights = [weight.parameter for controller in find_controllers(model).values() for weight in controller.existing]
    return offloaded | {parameter for parameter in weights if parameter.numel() == 0}


def find_controller(model: nn.Module, adapter_name: str | None = None) -> Controller:
    """Return what drives the training of a DPS adapter."""
    controllers = find_controllers(model)
    if adapter_name is None and len(controllers) == 1:
        return next(iter(controllers.values()))
    if adapter_name not in controllers:
        raise ConfigError(f"`adapter_name` must be one of {sorted(controllers)}, got {adapter_name!r}.")
    return controllers[adapter_name]


def find_controllers(model: nn.Module) -> dict[str, Controller]:
    """Collect the controllers of all DPS adapters in a model, however the adapters were injected."""
    return _by_name(all_controllers(model))


def all_controllers(model: nn.Module) -> dict[Controller, str]:
    """Collect the controllers of all DPS adapters in a model, also where several have the same name."""
    found: dict[Controller, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, DPSLayer):
            for controller in module.dps_controllers.values():
                if isinstance(controller, Controller):
                    found.setdefault(controller, path)
    return found


def _by_name(found: Mapping[Controller, str]) -> dict[str, Controller]:
    named: dict[str, Controller] = {}
    for controller, path in found.items():
        if (other := named.setdefault(controller.adapter, controller)) is not controller:
            raise ConfigError(
                f"Two DPS adapters of this model are called {controller.adapter!r}: one has the layer "
                f"{found[other]!r}, the other {path!r}. Give one another name (`get_peft_model(part, config, "
                "adapter_name=...)`), or ask each part of the model by itself."
            )
    return named


def find_trained(model: nn.Module) -> dict[str, Controller]:
    """Collect the controllers of the DPS adapters that are being trained."""
    return _by_name(
        {
            controller: path
            for controller, path in all_controllers(model).items()
            if any(weight.parameter.requires_grad for weight in controller.existing)
        }
    )
