"""`DPSModel`: puts DPS layers in place of the targeted modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_dps.errors import AdapterFileError, ConfigError
from peft_dps.training.compact_controller import make_controller
from peft_dps.training.controller import Controller
from peft_dps.training.status import DPSStatus
from peft_dps.tuner.adapter import DPSAdapter, all_controllers, dps_adapter, find_controllers
from peft_dps.tuner.adapter_name import one_adapter, require_adapter_name
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.dispatch import check_layout, check_mergeable, check_reach, make_layer, wrap_parameter
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.loading import expect_kept_units, read_state, remember_units, require_saved_shapes
from peft_dps.tuner.method import settings_of
from peft_dps.tuner.model_card import make_section, write_section
from peft_dps.tuner.offload import offload_bases, offload_originals
from peft_dps.tuner.peft_interface import BaseTuner, PeftConfig, PeftModel
from peft_dps.tuner.removal import remove_adapter
from peft_dps.tuner.running_statistics import warn_of_statistics
from peft_dps.tuner.targets import expand_all_linear, is_target, refuse_separate_experts, save_remaining
from peft_dps.tuner.tied_targets import check_ties, tie_saved_modules
from peft_dps.tuner.trained_tensors import Besides
from peft_dps.tuner.weighted_adapter import combined_config, fill, make_terms

HALF_PRECISION = (torch.float16, torch.bfloat16)


class DPSModel(BaseTuner):
    """Dynamic Parameter Selection model: `get_peft_model(model, DPSConfig(...))` makes one.

    Args:
        model (torch.nn.Module): The model to train.
        config (DPSConfig): Its configuration.
        adapter_name (str): Name of the adapter.

    Example:
        ```py
        >>> from transformers import AutoModelForSequenceClassification
        >>> from peft import get_peft_model
        >>> from peft_dps import DPSConfig

        >>> base = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", total_steps=1000))
        ```
    """

    prefix: str = "dps_"
    tuner_layer_cls = DPSLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    _originals_wait = False
    _restore_units: Callable[[], None] = staticmethod(lambda: None)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wrap the targeted modules and add the adapter to them; see `BaseTuner.inject_adapter`.

        If it fails, the model is left as it was.
        """
        config = _as_dps(self.peft_config[adapter_name])
        require_adapter_name(adapter_name)
        config.validate()  # fields may have been set since it was made
        besides = Besides(model, adapter_name)
        controller = make_controller(adapter_name, config.recipe(), config.total_steps, besides)
        self._injecting = controller, low_cpu_mem_usage
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            check_ties(model, adapter_name)
            # PEFT leaves this to PeftModel, which transformers' `add_adapter` does without.
            self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            if not config.inference_mode:
                if config.offload_base or config.lean:
                    offload_bases(model, adapter_name)
                self._originals_wait |= config.lean
                warn_of_statistics(model)
        except Exception:
            controller.weights.clear()
            remove_adapter(self, adapter_name)
            for parameter in trained:
                parameter.requires_grad = True  # also one of a lazy layer
            raise
        finally:
            del self._injecting

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # PEFT asks for the weights before it saves the configuration, which brings the model card up to date.
        own = _as_dps(config)
        settings = settings_of(own)
        controller = next(
            (
                each
                for each in all_controllers(model)
                if each.adapter == adapter_name and each.recipe.settings == settings
            ),
            None,
        )
        if controller is not None:
            controller.see_saving()
            own.write_card = partial(write_section, make_section(own, controller))
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # PEFT's place for what a tuner does with a loaded state dict, before it reaches the model.
        config = _as_dps(config)
        tuner: Any = model.base_model if isinstance(model, PeftModel) else None
        if tuner is not None:  # a file is refused after this too, when room has been made for its units
            tuner._restore_units = remember_units(model, adapter_name)
        expect_kept_units(model, adapter_name, state_dict)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            return read_state(model, adapter_name, mapped)
        except AdapterFileError:
            if tuner is not None:
                del tuner._restore_units
                if _is_to_be_filled(config, find_controllers(model).get(adapter_name)):
                    remove_adapter(tuner, adapter_name)
            raise

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Called before anything is loaded into the modules inside, and after PEFT has left out what it shall ignore.
        loaded = [
            (name, _as_dps(config))
            for name, config in self.peft_config.items()
            if any(f".{name}." in f"{key}." for key in state_dict)
        ]
        controllers = {controller.adapter: controller for controller in all_controllers(self.model)}
        try:
            require_saved_shapes(self.state_dict(prefix=prefix), state_dict)
        except AdapterFileError:
            for name, config in loaded:
                if _is_to_be_filled(config, controllers.get(name)):
                    remove_adapter(self, name)
            self._restore_units()
            raise
        finally:
            self.__dict__.pop("_restore_units", None)
        for name, config in loaded:
            config.is_to_be_filled = False
            if name in controllers:
                controllers[name].loaded_after = controllers[name].clock.step
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dps_status(self, adapter_name: str | None = None) -> DPSStatus:
        """Tell what DPS is doing; see `DPSAdapter.status`."""
        return self._adapter(adapter_name).status()

    def dps_state_dict(self, adapter_name: str | None = None) -> dict[str, Any]:
        """Take down the training state of an adapter; see `DPSAdapter.state_dict`."""
        return self._adapter(adapter_name).state_dict()

    def load_dps_state_dict(self, state: Mapping[str, Any], adapter_name: str | None = None) -> None:
        """Go on where the training was whose state was taken down; see `DPSAdapter.load_state_dict`."""
        self._adapter(adapter_name).load_state_dict(state)

    def save_dps_state(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Save the training state of an adapter to a file; see `DPSAdapter.save_state`."""
        self._adapter(adapter_name).save_state(path)

    def load_dps_state(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Go on where the training was whose state is in a file; see `DPSAdapter.load_state`."""
        self._adapter(adapter_name).load_state(path)

    def set_dps_total_steps(self, total_steps: int, adapter_name: str | None = None) -> None:
        """Begin a training of so many optimizer steps; see `DPSAdapter.set_total_steps`."""
        self._adapter(adapter_name).set_total_steps(total_steps)

    def dps_score(
        self,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
        adapter_name: str | None = None,
        *,
        per_example: bool = False,
    ) -> None:
        """Gather evidence from batches before training; see `DPSAdapter.score`.

        Args:
            batches: The batches: keyword arguments of the model, unless `loss` knows better.
            loss: Returns the loss of the model on a batch; None for `model(**batch).loss`.
            adapter_name: Name of the adapter; None for the active one.
            per_example: Whether each example of a batch, along the first axis of its tensors, is scored by itself, as
                the empirical Fisher information asks for.
        """
        self._adapter(adapter_name).score(self.model, batches, loss or _own_loss, per_example=per_example)

    def _adapter(self, adapter_name: str | None) -> DPSAdapter:
        return dps_adapter(self.model, self._one_adapter(adapter_name))

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that combines others: W_new = W0 + sum_i w_i (W_i - W0), as in task arithmetic.

        The same goes for biases and for the copies of `modules_to_save`; an adapter that does not train a tensor adds
        nothing to it. The new adapter has the first one's settings and is not active. That of compact adapters, which
        have to be of the same granularity, holds the units of all.

        Args:
            adapters: Names of the adapters to combine.
            weights: A factor w_i for each, negative ones too.
            adapter_name: Name of the new adapter.
            combination_type: Only `"linear"`; LoRA's others need low-rank factors.

        Raises:
            ConfigError: If one of the arguments cannot work.
        """
        terms = make_terms(list(self.peft_config), adapters, weights, adapter_name, combination_type)
        config = combined_config(self.model, [_as_dps(self.peft_config[name]) for name in adapters], terms)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        fill(self.model, adapter_name, terms)

    def _one_adapter(self, adapter_name: str | None) -> str:
        return one_adapter(adapter_name, self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops `adapter_names` in silence where a tuner has no such method.
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("`adapter_names` (one adapter per sample) works with LoRA only; use `set_adapter`.")
        if self.training and self._originals_wait:  # PEFT wraps modules to save after the injection
            offload_originals(self.model)
            self._originals_wait = False
        yield

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = _as_dps(peft_config)
        expand_all_linear(config, model)
        refuse_separate_experts(config, model)
        check_reach(config, model)
        if config.train_remaining:
            save_remaining(config, model)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        # PEFT warns that tied copies come apart; `train_remaining` ties them.
        if not _as_dps(peft_config).train_remaining:
            super()._check_tied_modules(model, peft_config)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        mine = set(_as_dps(config).target_parameters or ())
        for name, other in self.peft_config.items():
            theirs = set(_as_dps(other).target_parameters or ())
            # Wrappers of several parameters lie around each other, and a checkpoint tells them apart by their order.
            if mine and theirs and mine != theirs:
                raise ConfigError(
                    f"`target_parameters` must be the same in all adapters that have them, got {sorted(mine)}, and "
                    f"{sorted(theirs)} in the adapter {name!r}."
                )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base layers, after a check of all of them; see `BaseTuner.merge_adapter`."""
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge_allowed(self) -> None:
        # PEFT does not tell it which adapters, and warns of tied weights, which its layers would write into; here
        # merging unties the layer first.
        pass

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        check_mergeable(self.model, names)
        for controller in all_controllers(self.model):
            if controller.adapter in names:
                controller.see_saving("merged")

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        return is_target(_as_dps(peft_config), key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        controller, low_cpu_mem_usage = self._injecting
        layer: DPSLayer
        if parameter_name is not None:
            layer = wrap_parameter(target, parameter_name, current_key, controller.recipe)
        else:
            recipe = controller.recipe
            layer = target if isinstance(target, DPSLayer) else make_layer(target, current_key, recipe, self.model)
        check_layout(layer, controller.recipe, current_key)
        is_new = not layer.dps_controllers
        layer.update_layer(adapter_name, _as_dps(peft_config), controller, low_cpu_mem_usage)
        if is_new:
            self._replace_module(parent, target_name, layer, target)
        controller.track(current_key, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version reads the weight of what it replaces, which a head of several layers does not have.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's version makes new parameters, which makes inactive adapters trainable.
        for module in self.model.modules():
            if isinstance(module, DPSLayer):
                delta, dtype = module.delta(adapter_name), module.pretrained()[0].dtype
                if delta is not None and dtype in HALF_PRECISION:
                    delta.to(torch.float32 if autocast_adapter_dtype else dtype)
                for container, base in zip((module.dps_weight, module.dps_bias), module.pretrained(), strict=True):
                    if adapter_name in container and base is not None and base.dtype in HALF_PRECISION:
                        dtype = torch.float32 if autocast_adapter_dtype else base.dtype
                        container[adapter_name].data = container[adapter_name].data.to(dtype)
        # PEFT calls this after every load, and with `low_cpu_mem_usage=True` that puts new parameters in.
        if _as_dps(self.peft_config[adapter_name]).train_remaining:
            tie_saved_modules(self.model, adapter_name)


def _is_to_be_filled(config: DPSConfig, controller: Controller | None) -> bool:
    """Tell whether an adapter was put into a model to be loaded, and nothing has been trained in it since."""
    return config.is_to_be_filled and (controller is None or controller.clock.step == 0)


def _own_loss(model: nn.Module, batch: Any) -> Any:
    remedy = "Or give `loss=`, a function of the model and a batch that returns its loss."
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"`batches` must hold dicts, which are passed as `model(**batch)`, got a {type(batch).__name__}. {remedy}"
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ConfigError(
            f"The model returned a {type(output).__name__} without a loss for a batch of {sorted(map(str, batch))}. "
            f"Put `labels` into `batches`. {remedy}"
        )
    return loss


def _as_dps(config: PeftConfig) -> DPSConfig:
    if not isinstance(config, DPSConfig):
        raise ConfigError(f"A DPS model takes a DPSConfig, got {type(config).__name__}.")
    return config
