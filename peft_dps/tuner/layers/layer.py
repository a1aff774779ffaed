"""`DPSLayer`: wraps a target module and computes with what is trained of its weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.observing import observed
from peft_dps.masking.effective_weight import EffectiveWeight
from peft_dps.training.guards import refuse_split, refuse_unfrozen
from peft_dps.tuner.layers.merging import MergingLayer


class DPSLayer(MergingLayer):
    """Tuner layer that trains a copy of the base layer's weight, or values of its selected units.

    The base layer stays frozen: it is the pretrained weight W0, it is what runs when adapters are disabled, and
    what the adapter adds to W0 is the delta by which several adapters are combined and merged. With one active adapter
    the forward is the base layer's operation with the adapter's weight in place of W0. In compact storage it is the
    base layer's own, and what the selected units add.

    Attributes:
        dps_weight: Per adapter, the trainable weight, in the base weight's shape and layout.
        dps_delta: Per adapter in compact storage, values of the selected units.
        dps_bias: Per adapter, the trainable bias; missing where the base layer has none or `train_bias=False`.
        dps_controllers: Per adapter, what drives its training.
        in_features: Size of the input, as PEFT wants it of every layer.
        out_features: Size of the output.
        entries: Number of entries of the weight.
        supports_lora: Whether the weight is a matrix, whose delta a LoRA of the same kind of layer can approximate.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the base layer's operation with the weight of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._adapters_in_effect()
        is_split = isinstance(self.get_base_layer()._parameters.get(self.parameter_name), DTensor)
        if is_split:
            self._require_split_deltas(names)
        prepared = self._prepare_training(names)  # which may select units anew
        whole = [name for name in names if not self._adds_to_output(name)]
        compute: Callable[[torch.Tensor], torch.Tensor]
        if len(whole) == 1 and self._adds_entries(whole[0]) and whole[0] not in prepared:
            compute = partial(self._compute_with_entries, whole[0])
        elif whole:
            one = prepared.pop(whole[0], None) if len(whole) == 1 and whole[0] not in self.dps_delta else None
            weight, bias = self._combined(whole, prepared)
            compute = partial(self._compute, weight=weight, bias=bias, effective=one)
        else:
            compute = partial(self._call_base_on, args, kwargs)
            compute = partial(self._compute_split, compute) if is_split and names else compute
        for name in names:
            if name not in whole:
                add = partial(self._compute_with_delta, compute, name, prepared.get(name))
                compute = partial(self._call_delta, name, add)
        return compute(x)

    def _require_split_deltas(self, names: list[str]) -> None:
        """Refuse adapters that cannot compute beside a weight that is split over processes."""
        if isinstance(self.get_base_layer(), FSDPModule):  # which has it whole in its own forward
            return
        for name in names:
            delta = self.delta(name)
            if delta is None or not delta.is_slices:
                refuse_split(name, "a copy of the whole weight" if delta is None else "units that are no slices of it")
            elif self.split is None:
                refuse_split(name, f"a {type(self.get_base_layer()).__name__} for a target")
            elif name in self.dps_bias:
                refuse_split(name, "a bias to train")
            elif self.training and self.pretrained_parameter.requires_grad:
                refuse_unfrozen(name)

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def _add_delta(
        self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, delta: Delta
    ) -> torch.Tensor:
        """Add to what `compute` makes of `x` what the selected rows, columns or tiles do."""
        raise NotImplementedError

    def _weight_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight, of an input and the gradient of the output."""
        raise NotImplementedError

    def _call_delta(self, name: str, add: Callable[[torch.Tensor, Delta], torch.Tensor], x: torch.Tensor) -> Any:
        return self.dps_delta[name](partial(add, x))

    def _compute_with_delta(
        self, compute: Callable[[torch.Tensor], torch.Tensor], name: str, observe: Any, x: torch.Tensor, delta: Delta
    ) -> torch.Tensor:
        y = self._add_delta(compute, x, delta) if delta.is_selected and delta.parts() else compute(x)
        if name in self.dps_bias:
            pretrained: Any = self.pretrained_bias()
            y = self._add_bias(y, self.dps_bias[name] - pretrained.to(self.dps_bias[name].dtype))
        if observe is not None:
            y = observed(y, x, self._weight_gradient, observe, delta.waiting)
        return y

    def _compute_split(self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Compute with a base layer of which this process may have a part."""
        return compute(x)

    def _adds_entries(self, name: str) -> bool:
        """Tell whether an adapter adds to single entries, and the layer can compute with these."""
        return False

    def _compute_with_entries(self, name: str, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _add_bias(self, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return y + bias.to(y.dtype)

    def _adds_to_output(self, name: str) -> bool:
        """Tell whether an adapter adds to the output, and leaves the weight alone."""
        delta = self.delta(name)
        return delta is not None and (delta.adds_to_output or not delta.is_selected or not delta.parts())

    def _call_base_on(self, args: Any, kwargs: Any, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._call_base(x, *args, **kwargs)
        return output

    def _call_base(self, *args: Any, **kwargs: Any) -> Any:
        home = self._home()
        if home is None or home == self._base.in_base(self.get_base_layer())[0].device:  # at hand, or merged
            return self.base_layer(*args, **kwargs)
        return self._call_base_with(self.pretrained()[0], *args, **kwargs)

    def _call_base_with(self, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer with another weight in place of its own."""
        path, module = self.parameter_name, self.base_layer
        while isinstance(module, DPSLayer):
            path, module = f"base_layer.{path}", module.base_layer
        return functional_call(self.base_layer, {path: weight}, args, kwargs, tie_weights=False)


def cast_to_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cast fp32 master weights to the activation's dtype; autocast does that by itself."""
    if torch.is_autocast_enabled(x.device.type):
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
