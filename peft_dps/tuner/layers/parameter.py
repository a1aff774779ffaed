"""DPS on a single parameter of a module, such as the fused weights of the experts of a mixture."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_dps.tensors.layout import Layout, experts
from peft_dps.tuner.layers.layer import DPSLayer


# PEFT finds the layers of `target_parameters` by this class name.
class ParamWrapper(DPSLayer):
    """DPS on a parameter of any shape: the module computes with the adapter's copy in its place.

    For several parameters of a module, wrappers are put around each other.
    """

    bias_name = None

    def __init__(self, base_layer: nn.Module, parameter_name: str, key: str) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer)
        self.key = key
        shape = self.pretrained_parameter.shape
        self.in_features, self.out_features = shape[-1], shape[-2] if len(shape) > 1 else shape[-1]
        if len(shape) == 3 and self._is_transposed():
            self.in_features, self.out_features = self.out_features, self.in_features

    @property
    def weight(self) -> Any:
        """The module's weight, for modules that read it: the one in effect, if it is what is trained."""
        return super().weight if self.parameter_name == "weight" else self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The module's bias, like `weight`."""
        return super().weight if self.parameter_name == "bias" else self.base_layer.bias

    @property
    def layout(self) -> Layout:
        """A row per output and a column per input of each expert, where something tells which axis holds inputs."""
        shape, transposed = tuple(self.pretrained_parameter.shape), self._is_transposed()
        return Layout(shape, None, None) if transposed is None else experts(shape, transposed=transposed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the weight of the active adapters in place of its parameter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self._adapters_in_effect():
            return self._call_base(*args, **kwargs)
        return self._call_base_with(self._effective().to(self.pretrained_parameter.dtype), *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module itself, without the wrappers around each other."""
        if isinstance(self.base_layer, ParamWrapper):
            self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    def _is_transposed(self) -> bool | None:
        """Tell whether the experts' weights are `[experts, in, out]`; None if there is no telling."""
        transposed = getattr(self.get_base_layer(), "is_transposed", None)
        known = isinstance(transposed, bool) and self.pretrained_parameter.dim() == 3
        return transposed if known else None

    def extra_repr(self) -> str:
        """Name the parameter, which tells wrappers around one module apart."""
        return f"parameter_name={self.parameter_name!r}"


def path_in_base(model: nn.Module, key: str) -> str:
    """Return the path that a module has in the base model, without the wrappers of parameters around it."""
    parts = key.split(".")
    own = [
        part
        for place, part in enumerate(parts)
        if part != "base_layer" or not isinstance(model.get_submodule(".".join(parts[:place])), ParamWrapper)
    ]
    return ".".join(own)


def find_wrapper(module: nn.Module, parameter_name: str) -> ParamWrapper | None:
    """Return the wrapper of a parameter among those around a module, if there is one."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None
