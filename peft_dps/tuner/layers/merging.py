"""`MergingLayer`: the weight in effect, of one adapter or several, and its way into the base layer and out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dps.errors import TargetError
from peft_dps.masking.compact.observing import Observe, observed_weight
from peft_dps.masking.effective_weight import EffectiveWeight, materialize
from peft_dps.training.layer import TargetLayer, Training
from peft_dps.tuner.layers.state import LayerState
from peft_dps.tuner.peft_interface import check_adapters_to_merge


class MergingLayer(LayerState):
    """A layer that computes the weight in effect, and merges it into the base layer.

    That is the weight of the active adapter, or W0 plus the deltas of several.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' weights into the base layer.

        The merged weight is computed from the pretrained one with all merged adapters at once, and the pretrained one
        is kept until `unmerge`, which is therefore exact to the bit. The merged weight is a parameter of its own: a
        layer that shared the pretrained one (tied embeddings) keeps that.

        Args:
            safe_merge: Check the merged values for NaN and infinity before anything is changed.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If `safe_merge` finds a value that is not finite.
            TargetError: If nothing may read or write the pretrained weight.
        """
        new_names = [name for name in check_adapters_to_merge(self, adapter_names) if self.trained(name) is not None]
        if not new_names:
            return
        self.check_mergeable(new_names)
        names = [*self.merged_adapters, *new_names]
        with torch.no_grad():
            weight, bias = self._combined(names)
            base_weight, base_bias = self.pretrained()
            weight = _detached_as(weight, base_weight)
            bias = None if bias is None or base_bias is None else _detached_as(bias, base_bias)
        if safe_merge:
            for tensor in (weight, bias):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {', '.join(new_names)} seems to be broken"
                    )
        self._base.merge(self.get_base_layer(), weight, bias)
        self.merged_adapters = names

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Check that the base layer can take in what adapters have trained.

        Raises:
            TargetError: If nothing may read or write the pretrained weight.
        """
        name = next((name for name in adapter_names if self.trained(name) is not None), None)
        cut = "its weight is cut over processes" if isinstance(self.pretrained_parameter, DTensor) else None
        why = self.unread or cut
        if name is not None and why is not None:
            raise TargetError(
                f"The adapter {name!r} cannot be merged into a {type(self.get_base_layer()).__name__}: {why}. "
                "Leave it beside the base model, export it as a LoRA (`export_adapter(form='lora')`), or load it onto "
                "a base model whose weights are in memory in full precision, and merge there."
            )

    def unmerge(self) -> None:
        """Give the base layer its pretrained weight and bias back, bit for bit."""
        if not self._base.unmerge(self.get_base_layer()):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_adapters = []

    @property
    def weight(self) -> torch.Tensor:
        """The weight in effect, for modules that read it instead of calling the layer; dtype of the base weight.

        That of the base layer, as it is stored, where nothing may read W0.
        """
        if self.disable_adapters and self.merged:
            return self.pretrained()[0]
        base_weight = self._base.in_base(self.get_base_layer())[0]
        if self.unread is not None or not self._adapters_in_effect():
            return base_weight if self._home() in (None, base_weight.device) else self.pretrained()[0]
        names = self._adapters_in_effect()
        return self._combined_weight(names, self._prepare_training(names)).to(base_weight.dtype)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The bias in effect, like `weight`."""
        if self.disable_adapters and self.merged:
            return self.pretrained_bias()
        base_bias = self._base.in_base(self.get_base_layer())[1]
        if base_bias is None or not self._adapters_in_effect():
            return base_bias
        bias = self._combined_bias(self._adapters_in_effect())
        return None if bias is None else bias.to(base_bias.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged or not, with all of its weights in memory; PEFT asks for it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._base.restore(self.get_base_layer())
        return self.get_base_layer()

    def _effective(self) -> torch.Tensor:
        names = self._adapters_in_effect()
        return self._combined_weight(names, self._prepare_training(names))

    def _combined(
        self, names: list[str], prepared: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and bias of one adapter, or W0 plus the deltas of several."""
        return self._combined_weight(names, prepared or {}), self._combined_bias(names)

    def _combined_weight(self, names: list[str], prepared: dict[str, Any]) -> torch.Tensor:
        weights = [self._own_weight(name, prepared.get(name)) for name in names]
        return weights[0] if len(names) == 1 else _plus_deltas(self.pretrained()[0], weights)

    def _combined_bias(self, names: list[str]) -> torch.Tensor | None:
        biases: list[Any] = [self.dps_bias[name] for name in names if name in self.dps_bias]
        if len(names) == 1 and biases:
            return biases[0]  # type: ignore[no-any-return]
        pretrained = self.pretrained_bias()
        return None if pretrained is None else _plus_deltas(pretrained, biases)

    def _own_weight(self, name: str, prepared: Any) -> Any:
        """Return an adapter's weight, as a training forward sees it where something is prepared for that."""
        delta = self.delta(name)
        if delta is None:
            weight: Any = self.trained(name)
            return weight if prepared is None else materialize(weight, prepared)
        weight = delta.applied(self.pretrained()[0])
        if prepared is None:
            return weight
        return observed_weight(weight, prepared, delta.waiting)

    def _prepare_training(self, names: list[str]) -> dict[str, Any]:
        """Announce a training forward to the adapters, of which some want their part in it.

        Returns:
            Per adapter, its effective weight, or what is to be shown the gradient of the weight in compact storage.
        """
        prepared = {}
        for name in names:
            controller, delta, made = self.dps_controllers[name], self.delta(name), None
            if delta is not None:
                if delta.observes and (self.training or controller.scores_batches):
                    made = _observer(controller, self)
            # Dense leaves a compiled graph whole; Mix breaks it here.
            elif self.training and (controller.needs_forwards or not torch.compiler.is_compiling()):
                weight = self.trained(name)
                made = _announce(controller, self) if weight is not None and weight.requires_grad else None
            if made is not None:
                prepared[name] = made
        return prepared


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _announce(controller: Training, layer: TargetLayer) -> EffectiveWeight | None:
    return controller.on_forward(layer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _observer(controller: Training, layer: TargetLayer) -> Observe | None:
    return controller.observer(layer)


def _plus_deltas(base: torch.Tensor, trained: list[Any]) -> torch.Tensor:
    return sum((own - base.to(own.dtype) for own in trained), start=base)


def _detached_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Merged weights must not share memory with the adapter, and `.to` of the same dtype would.
    return tensor.detach().to(device=like.device, dtype=like.dtype, copy=True)
