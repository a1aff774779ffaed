"""`DPSModel`: puts DPS layers in place of the targeted modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dps.config import DPSConfig
from peft_dps.errors import AdapterFileError, ConfigError, TargetError
from peft_dps.layer import DPSLayer
from peft_dps.linear import Conv1DLinear, Linear
from peft_dps.loading import read_state, require_saved_shapes, take_out
from peft_dps.status import DPSStatus, status_of
from peft_dps.subnetwork import Subnetwork
from peft_dps.targets import expand_all_linear, is_target, save_remaining, tie_saved_modules

LAYER_TYPES: dict[type[nn.Module], type[DPSLayer]] = {nn.Linear: Linear, Conv1D: Conv1DLinear}
TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DPSModel(BaseTuner):
    """Dynamic Parameter Selection model: `get_peft_model(model, DPSConfig(...))` makes one.

    Args:
        model (`torch.nn.Module`): The model to train.
        config (`DPSConfig`): Its configuration.
        adapter_name (`str`): Name of the adapter.

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
        subnetwork = Subnetwork(adapter_name, config)
        self._injecting = subnetwork, low_cpu_mem_usage
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            if config.train_remaining:
                tie_saved_modules(model, adapter_name)
        except Exception:
            _take_out(model, subnetwork)
            raise
        finally:
            del self._injecting

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # PEFT's place for what a tuner does with a loaded state dict, before it reaches the model.
        config = _as_dps(config)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            return read_state(model, adapter_name, mapped)
        except AdapterFileError:
            if config.is_to_be_filled and isinstance(model, PeftModel):
                tuner: Any = model.base_model
                take_out(tuner, adapter_name)
            raise

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Called before anything is loaded into the modules inside, and after PEFT has left out what it shall ignore.
        loaded = [
            (name, _as_dps(config))
            for name, config in self.peft_config.items()
            if any(f".{name}." in f"{key}." for key in state_dict)
        ]
        try:
            require_saved_shapes(self.state_dict(), state_dict, prefix)
        except AdapterFileError:
            for name, config in loaded:
                if config.is_to_be_filled:
                    take_out(self, name)
            raise
        for _, config in loaded:
            config.is_to_be_filled = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dps_status(self, adapter_name: str | None = None) -> DPSStatus:
        """Tell what DPS is doing; see `peft_dps.dps_status`."""
        return dps_status(self.model, self._one_adapter(adapter_name))

    def set_dps_total_steps(self, total_steps: int, adapter_name: str | None = None) -> None:
        """Begin a training of so many optimizer steps: a fractional `stage_steps` refers to them.

        The stages start anew. With the HF Trainer there is no need to call this.

        Args:
            total_steps: Number of optimizer steps of the whole training, at least 2.
            adapter_name: Name of the adapter; None for the active one.

        Raises:
            ConfigError: If the number is no integer or too small, or there is no such adapter.
        """
        if type(total_steps) is not int or total_steps < 2:
            raise ConfigError(f"`total_steps` must be an integer of at least 2, got {total_steps!r}.")
        _pick(find_subnetworks(self.model), self._one_adapter(adapter_name)).restart(total_steps)

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is not None:
            return adapter_name
        if len(self.active_adapters) != 1:
            raise ConfigError(f"`adapter_name` is needed, since the active adapters are {self.active_adapters}.")
        return self.active_adapters[0]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops `adapter_names` in silence where a tuner has no such method.
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("`adapter_names` (one adapter per sample) works with LoRA only; use `set_adapter`.")
        yield

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = _as_dps(peft_config)
        expand_all_linear(config, model)
        if config.train_remaining:
            save_remaining(config, model)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        # PEFT warns that tied copies come apart; `train_remaining` ties them.
        if not _as_dps(peft_config).train_remaining:
            super()._check_tied_modules(model, peft_config)

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
        subnetwork, low_cpu_mem_usage = self._injecting
        layer = target if isinstance(target, DPSLayer) else _make_layer(target, current_key)
        layer.update_layer(adapter_name, _as_dps(peft_config), subnetwork, low_cpu_mem_usage)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        subnetwork.track(current_key, layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's version makes new parameters, which makes inactive adapters trainable.
        if not autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, DPSLayer):
                for container in (module.dps_weight, module.dps_bias):
                    if adapter_name in container and container[adapter_name].dtype in (torch.float16, torch.bfloat16):
                        container[adapter_name].data = container[adapter_name].data.float()


def dps_status(model: nn.Module, adapter_name: str | None = None) -> DPSStatus:
    """Tell what DPS is doing: cycle, stage, entries selected per layer, and whether a frozen entry moved.

    Args:
        model: A PEFT model, or any module into which DPS adapters were injected.
        adapter_name: Name of the adapter; None if there is only one.

    Returns:
        A snapshot, printable.

    Raises:
        ConfigError: If there is no such adapter, or several and none is named.
    """
    return status_of(_pick(find_subnetworks(model), adapter_name))


def _pick(subnetworks: dict[str, Subnetwork], adapter_name: str | None) -> Subnetwork:
    if adapter_name is None and len(subnetworks) == 1:
        return next(iter(subnetworks.values()))
    if adapter_name not in subnetworks:
        raise ConfigError(f"`adapter_name` must be one of {sorted(subnetworks)}, got {adapter_name!r}.")
    return subnetworks[adapter_name]


def find_subnetworks(model: nn.Module) -> dict[str, Subnetwork]:
    """Collect the subnetworks of all DPS adapters in a model, however the adapters were injected.

    Args:
        model: A PEFT model, or any module that holds DPS layers.

    Returns:
        Per adapter name, its subnetwork.
    """
    found: dict[str, Subnetwork] = {}
    for module in model.modules():
        if isinstance(module, DPSLayer):
            for name, subnetwork in module.dps_subnetworks.items():
                if isinstance(subnetwork, Subnetwork):
                    found.setdefault(name, subnetwork)
    return found


def _make_layer(target: nn.Module, key: str) -> DPSLayer:
    if isinstance(target, BaseTunerLayer):
        raise TargetError(
            f"The target {key!r} is already wrapped by another tuner ({type(target).__module__}). Unload that adapter "
            "first, or leave the module out with `exclude_modules`."
        )
    weight = getattr(target, "weight", None)
    if isinstance(weight, torch.Tensor) and (weight.dtype not in TRAINABLE_DTYPES or _is_quantized(weight)):
        raise TargetError(
            f"The weight of the target {key!r} is quantized ({type(target).__name__}, {weight.dtype}). DPS trains "
            "full-precision weights: load the model without quantization, or use LoRA on a quantized model."
        )
    layer_cls = next(
        # A subclass that computes something else would be replaced by a plain linear layer.
        (
            cls
            for base, cls in LAYER_TYPES.items()
            if isinstance(target, base) and type(target).forward is base.forward
        ),
        None,
    )
    if layer_cls is None:
        supported = ", ".join(base_cls.__name__ for base_cls in LAYER_TYPES)
        raise TargetError(
            f"The target {key!r} is a {type(target).__name__}, which DPS cannot train; it supports {supported}. Leave "
            "it out with `exclude_modules`, or train it in full with `modules_to_save`."
        )
    parameter = target._parameters.get("weight")
    if parameter is None:
        raise TargetError(
            f"The weight of the target {key!r} is computed from other parameters (torch.nn.utils.parametrize), so it "
            "cannot be trained itself. Remove the parametrization, or leave the module out with `exclude_modules`."
        )
    if parameter.device.type == "meta" or parameter.numel() == 0 or type(parameter.data).__name__ == "DTensor":
        raise TargetError(
            f"The weight of the target {key!r} is empty, on the meta device or sharded, so there is nothing to copy. "
            "Add the adapter to the fully loaded model, before it is sharded (FSDP, ZeRO-3) or dispatched."
        )
    return layer_cls(target)


def _is_quantized(weight: torch.Tensor) -> bool:
    # torchao's weights are tensor subclasses of a floating dtype; bitsandbytes' are parameters with a state.
    subclass = type(weight.data) is not torch.Tensor and type(weight.data).__name__ != "DTensor"
    return subclass or any(hasattr(weight, name) for name in ("quant_state", "SCB"))


def _take_out(model: nn.Module, subnetwork: Subnetwork) -> None:
    """Undo an injection that failed midway."""
    subnetwork.weights.clear()
    for key, module in list(model.named_modules()):
        if isinstance(module, DPSLayer) and module.dps_subnetworks.get(subnetwork.adapter) is subnetwork:
            for container in (module.dps_weight, module.dps_bias, module.dps_subnetworks):
                if subnetwork.adapter in container:
                    del container[subnetwork.adapter]
            if not module.dps_subnetworks:
                model.set_submodule(key, module.get_base_layer())


def _as_dps(config: PeftConfig) -> DPSConfig:
    if not isinstance(config, DPSConfig):
        raise ConfigError(f"A DPS model takes a DPSConfig, got {type(config).__name__}.")
    return config
