"""A layer around a base layer, and where the pretrained weight is: in the base layer, beside it, or in a file."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call

from peft_dps.tensors.file import on_disk


class BaseLayerWrapper(nn.Module, BaseTunerLayer):
    """Knows the weight and bias of the base layer that it is around.

    Attributes:
        base_layer: The base layer, or another wrapper around it.
        parameter_name: Name of the weight in the base layer.
        bias_name: Name of the bias in the base layer; None if it is not to be trained with the weight.
    """

    base_layer: nn.Module
    parameter_name: str = "weight"
    bias_name: ClassVar[str | None] = "bias"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self._offloaded_from: torch.device | None = None  # where W0 would be; None if it is there

    @property
    def pretrained_parameter(self) -> nn.Parameter:
        """The parameter that holds the pretrained weight W0, also while adapters are merged into the base layer."""
        return (self._unmerged or self._parameters_of_base())[0]

    @property
    def is_offloaded(self) -> bool:
        """Whether the pretrained weight W0 is kept in a file."""
        return self._offloaded_from is not None

    def offload_base(self) -> None:
        """Keep the pretrained weight W0 in a file; whatever needs it reads it from there."""
        if self._offloaded_from is None:
            self._offloaded_from = self.pretrained_parameter.device
            self._keep_pretrained(on_disk(self.pretrained_parameter.data))

    def restore_base(self) -> None:
        """Bring an offloaded W0 back into memory, where it was."""
        if self._offloaded_from is not None and self._unmerged is None:
            self._keep_pretrained(self.pretrained_parameter.data.to(self._offloaded_from, copy=True))
            self._offloaded_from = None

    def _home(self) -> torch.device | None:
        """Return the device that W0 is handed out on, if it lies in a file."""
        return self._offloaded_from

    def _call_base(self, *args: Any, **kwargs: Any) -> Any:
        weight = self._parameters_of_base()[0]
        if self._home() in (None, weight.device):  # at hand, or merged
            return self.base_layer(*args, **kwargs)
        return self._call_base_with(self._pretrained()[0], *args, **kwargs)

    def _call_base_with(self, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer with another weight in place of its own."""
        path, module = self.parameter_name, self.base_layer
        while isinstance(module, BaseLayerWrapper):
            path, module = f"base_layer.{path}", module.base_layer
        return functional_call(self.base_layer, {path: weight}, args, kwargs, tie_weights=False)

    def _pretrained(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W0 and the pretrained bias, also while adapters are merged into the base layer."""
        weight, home = self.pretrained_parameter.data, self._home()
        return weight if home is None else weight.to(home), self._pretrained_bias()

    def _pretrained_bias(self) -> torch.Tensor | None:
        bias = (self._unmerged or self._parameters_of_base())[1]
        return None if bias is None else bias.data

    def _keep_pretrained(self, data: torch.Tensor) -> None:
        parameter = _with_data(self.pretrained_parameter, data)
        if self._unmerged is None:
            # With `low_cpu_mem_usage=True` PEFT makes a meta tensor of every parameter that is set.
            self.get_base_layer()._parameters[self.parameter_name] = parameter
        else:
            self._unmerged = parameter, self._unmerged[1]

    def _parameters_of_base(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return the parameters that the base layer computes with."""
        base: Any = self.get_base_layer()
        bias = None if self.bias_name is None else getattr(base, self.bias_name, None)
        return getattr(base, self.parameter_name), bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What merging keeps is no buffer, since a state dict must not hold it; it still moves with the module.
        offloaded = None
        if self._offloaded_from is not None:
            offloaded = self.pretrained_parameter.data
            self._offloaded_from = fn(torch.empty(0, dtype=offloaded.dtype, device=self._offloaded_from)).device
        if self._unmerged is not None:
            weight, bias = self._unmerged
            self._unmerged = (
                _with_data(weight, fn(weight.data)),
                None if bias is None else _with_data(bias, fn(bias.data)),
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if offloaded is not None:
            self._offload_again(offloaded)
        return self

    def _offload_again(self, offloaded: torch.Tensor) -> None:
        """Keep W0 in its file although the module was moved, or write it anew if it was changed."""
        moved = self.pretrained_parameter.data
        if moved.is_meta or (moved.device != offloaded.device and moved.dtype == offloaded.dtype):
            self._keep_pretrained(offloaded if moved.dtype == offloaded.dtype else on_disk(offloaded.to(moved.dtype)))
        elif moved.data_ptr() != offloaded.data_ptr():
            self._keep_pretrained(on_disk(moved))


def _with_data(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    # As torch's own `_apply` does: the parameter stays the same object where it can, so that ties last.
    if torch._has_compatible_shallow_copy_type(parameter.data, data):
        parameter.data = data
        return parameter
    return nn.Parameter(data, parameter.requires_grad)
