"""Where the pretrained weight of a layer is: in the base layer, beside it while adapters are merged, or in a file.

Or where nothing can read it, so that the base layer is only called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft_dps.tensors.file import on_disk


class PretrainedWeight:
    """The pretrained weight W0 and bias of a base layer, which every method is given.

    Args:
        name: Name of the weight in the base layer.
        bias_name: Name of the bias in the base layer; None if it is not to be trained with the weight.

    Attributes:
        unread: Why nothing may read W0, as in "it is offloaded"; None if it may be read.
    """

    unread: str | None = None

    def __init__(self, name: str, bias_name: str | None) -> None:
        self.name = name
        self.bias_name = bias_name
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self.offloaded_from: torch.device | None = None  # where W0 would be; None if it is there

    def in_base(self, base: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return the parameters that the base layer computes with."""
        bias = None if self.bias_name is None else getattr(base, self.bias_name, None)
        return getattr(base, self.name), bias

    def parameters(self, base: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return the parameters that hold W0 and the bias, also while adapters are merged into the base layer."""
        return self._unmerged or self.in_base(base)

    def merge(self, base: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Let the base layer compute with other values.

        A parameter of their own: a layer that shared the pretrained one (tied embeddings) keeps that.
        """
        self._unmerged = self._unmerged or self.in_base(base)
        setattr(base, self.name, nn.Parameter(weight, requires_grad=False))
        if bias is not None and self.bias_name is not None:
            setattr(base, self.bias_name, nn.Parameter(bias, requires_grad=False))

    def unmerge(self, base: nn.Module) -> bool:
        """Give the base layer its own values back; return whether it had others."""
        if self._unmerged is None:
            return False
        weight, bias = self._unmerged
        setattr(base, self.name, weight)
        if bias is not None and self.bias_name is not None:
            setattr(base, self.bias_name, bias)
        self._unmerged = None
        return True

    def offload(self, base: nn.Module) -> None:
        """Keep W0 in a file; whatever needs it reads it from there."""
        if self.offloaded_from is None:
            weight = self.parameters(base)[0]
            self.offloaded_from = weight.device
            self._keep(base, on_disk(weight.data))

    def restore(self, base: nn.Module) -> None:
        """Bring an offloaded W0 back into memory, where it was."""
        if self.offloaded_from is not None and self._unmerged is None:
            self._keep(base, self.parameters(base)[0].data.to(self.offloaded_from, copy=True))
            self.offloaded_from = None

    def apply(self, base: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], apply: Callable[[], Any]) -> None:
        """Move or cast with a module, as `nn.Module._apply` does.

        What merging keeps is no buffer, since a state dict must not hold it; it still moves with the module. A W0 in a
        file stays there.
        """
        offloaded = None
        if self.offloaded_from is not None:
            offloaded = self.parameters(base)[0].data
            self.offloaded_from = fn(torch.empty(0, dtype=offloaded.dtype, device=self.offloaded_from)).device
        if self._unmerged is not None:
            weight, bias = self._unmerged
            self._unmerged = (
                _with_data(weight, fn(weight.data)),
                None if bias is None else _with_data(bias, fn(bias.data)),
            )
        apply()
        if offloaded is None:
            return
        moved = self.parameters(base)[0].data
        if moved.is_meta or (moved.device != offloaded.device and moved.dtype == offloaded.dtype):
            self._keep(base, offloaded if moved.dtype == offloaded.dtype else on_disk(offloaded.to(moved.dtype)))
        elif moved.data_ptr() != offloaded.data_ptr():
            self._keep(base, on_disk(moved))

    def _keep(self, base: nn.Module, data: torch.Tensor) -> None:
        parameter = _with_data(self.parameters(base)[0], data)
        if self._unmerged is None:
            # With `low_cpu_mem_usage=True` PEFT makes a meta tensor of every parameter that is set.
            base._parameters[self.name] = parameter
        else:
            self._unmerged = parameter, self._unmerged[1]


class UnreadWeight(PretrainedWeight):
    """A pretrained weight W0 that nothing may read: the base layer is called as it is, and never written.

    Args:
        shape: Its shape, as a layer of the kind has it that is not quantized.
        dtype: What the values beside it are to have.
        why: Why nothing may read it, as in "it is offloaded".
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, why: str) -> None:
        super().__init__("weight", "bias")
        self.shape = shape
        self.dtype = dtype
        self.unread = why

    def in_base(self, base: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return what the base layer has for a weight, which some models look at the dtype of, and its bias."""
        weight = getattr(base, "qweight", None)
        weight = getattr(base, "weight", None) if weight is None else weight
        return self._stand_in(base) if weight is None else weight, self._bias(base)

    def parameters(self, base: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return what has the shape and the device of W0, and none of its values; and the bias."""
        return self._stand_in(base), self._bias(base)

    def _stand_in(self, base: nn.Module) -> nn.Parameter:
        one = torch.zeros((), dtype=self.dtype, device=device_of(base))
        return nn.Parameter(one.expand(self.shape), requires_grad=False)

    @staticmethod
    def _bias(base: nn.Module) -> nn.Parameter | None:
        bias = getattr(base, "bias", None)
        return bias if isinstance(bias, torch.Tensor) and bias.numel() else None  # type: ignore[return-value]

    def apply(self, base: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], apply: Callable[[], Any]) -> None:
        """Move or cast with a module; see `PretrainedWeight.apply`."""
        apply()


def is_offloaded(base: nn.Module) -> bool:
    """Tell whether accelerate keeps the weights of a module elsewhere between its forwards."""
    return bool(getattr(getattr(base, "_hf_hook", None), "offload", False))


def device_of(base: nn.Module) -> torch.device:
    """Return the device that a base layer computes on."""
    if is_offloaded(base):
        device: Any = getattr(base._hf_hook, "execution_device", None)
        return torch.device("cpu" if device is None else device)
    return next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))


def _with_data(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    # As torch's own `_apply` does: the parameter stays the same object where it can, so that ties last.
    if torch._has_compatible_shallow_copy_type(parameter.data, data):
        parameter.data = data
        return parameter
    return nn.Parameter(data, parameter.requires_grad)
