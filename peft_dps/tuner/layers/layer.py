"""`DPSLayer`: wraps a target module and holds, per adapter, a full trainable copy of its weight and bias."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from peft_dps.masking.effective import EffectiveWeight, materialize
from peft_dps.tensors.layout import Layout
from peft_dps.training.layer import Training
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.pretrained import PretrainedWeight


class DPSLayer(nn.Module, BaseTunerLayer):
    """Tuner layer that trains a copy of the base layer's weight.

    The base layer stays frozen: it is the pretrained weight W0, it is what runs when adapters are disabled, and
    `dps_weight - W0` is the delta by which several adapters are combined and merged. With one active adapter the
    forward is the base layer's operation with the adapter's weight in place of W0.

    Attributes:
        dps_weight: Per adapter, the trainable weight, in the base weight's shape and layout.
        dps_bias: Per adapter, the trainable bias; missing where the base layer has none or `train_bias=False`.
        dps_controllers: Per adapter, what drives its training.
        in_features: Size of the input, as PEFT wants it of every layer.
        out_features: Size of the output.
        entries: Number of entries of the weight.
        supports_lora: Whether the weight is a matrix, whose delta a LoRA of the same kind of layer can approximate.
    """

    adapter_layer_names: tuple[str, ...] = ("dps_weight", "dps_bias")
    other_param_names: tuple[str, ...] = ("dps_controllers",)
    base_layer: nn.Module
    in_features: int
    out_features: int
    parameter_name: str = "weight"  # of the weight in the base layer
    bias_name: ClassVar[str | None] = "bias"
    supports_lora: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dps_weight = nn.ParameterDict({})
        self.dps_bias = nn.ParameterDict({})
        self.dps_controllers: dict[str, Training] = {}
        self._base = PretrainedWeight(self.parameter_name, self.bias_name)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.entries = self.pretrained_parameter.numel()

    @property
    def layout(self) -> Layout:
        """Where the rows and columns of the weight are."""
        raise NotImplementedError

    @property
    def pretrained_parameter(self) -> nn.Parameter:
        """The parameter that holds the pretrained weight W0, also while adapters are merged into the base layer."""
        return self._base.parameters(self.get_base_layer())[0]

    @property
    def is_offloaded(self) -> bool:
        """Whether the pretrained weight W0 is kept in a file."""
        return self._base.offloaded_from is not None

    def offload_base(self) -> None:
        """Keep the pretrained weight W0 in a file; whatever needs it reads it from there."""
        self._base.offload(self.get_base_layer())

    def pretrained(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W0, on the device where it is computed with, and the pretrained bias, also while merged."""
        weight, bias = self._base.parameters(self.get_base_layer())
        home = self._home()
        return weight.data if home is None else weight.data.to(home), None if bias is None else bias.data

    def pretrained_weight(self) -> torch.Tensor:
        """Return W0, on the device where it is computed with."""
        return self.pretrained()[0]

    def training_of(self, adapter: str) -> Training | None:
        """Return what drives the training of an adapter."""
        return self.dps_controllers.get(adapter)

    def update_layer(
        self, adapter_name: str, config: DPSConfig, controller: Training, low_cpu_mem_usage: bool = False
    ) -> None:
        """Add an adapter: copy the base layer's weight and bias as its starting point."""
        weight, bias = self.pretrained()
        make, perturb = controller.storage.parameter, not config.init_weights
        self.dps_weight[adapter_name] = make(weight, on_meta=low_cpu_mem_usage, perturb=perturb)
        if bias is not None and config.train_bias:
            self.dps_bias[adapter_name] = make(bias, on_meta=low_cpu_mem_usage, perturb=perturb)
        self.dps_controllers[adapter_name] = controller
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def trained(self, adapter: str) -> nn.Parameter | None:
        """Return an adapter's trainable weight, or None: `dps_weight.get`, for whoever asks many times a step."""
        # `dps_weight[adapter]` is several attribute lookups, each of which fails first: many times as long.
        parameter = self._modules["dps_weight"]._parameters.get(adapter)  # type: ignore[union-attr]
        return self.dps_weight.get(adapter) if parameter is None else parameter

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what the adapter adds to the pretrained weight: dps_weight - W0.

        Args:
            adapter: Name of the adapter.

        Returns:
            The difference in the adapter's dtype, in the shape and layout of the base weight.
        """
        weight: torch.Tensor = self.dps_weight[adapter]
        return weight - self.pretrained()[0].to(weight.dtype)

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
        """
        new_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dps_weight]
        if not new_names:
            return
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

    def unmerge(self) -> None:
        """Give the base layer its pretrained weight and bias back, bit for bit."""
        if not self._base.unmerge(self.get_base_layer()):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_adapters = []

    @property
    def weight(self) -> torch.Tensor:
        """The weight in effect, for modules that read it instead of calling the layer; dtype of the base weight."""
        if self.disable_adapters and self.merged:
            return self.pretrained()[0]
        base_weight = self._base.in_base(self.get_base_layer())[0]
        if not self._adapters_in_effect():
            return base_weight if self._home() in (None, base_weight.device) else self.pretrained()[0]
        return self._effective()[0].to(base_weight.dtype)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The bias in effect, like `weight`."""
        if self.disable_adapters and self.merged:
            return self.pretrained()[1]
        base_bias = self._base.in_base(self.get_base_layer())[1]
        if base_bias is None or not self._adapters_in_effect():
            return base_bias
        bias = self._effective()[1]
        return None if bias is None else bias.to(base_bias.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged or not, with all of its weights in memory; PEFT asks for it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._base.restore(self.get_base_layer())
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT whether it may approximate the adapter's delta by a LoRA."""
        return self.supports_lora

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the base layer's operation with the weight of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._adapters_in_effect()
        if not names:
            output: torch.Tensor = self._call_base(x, *args, **kwargs)
            return output
        effective = self._prepare_training(names)
        weight, bias = self._combined(names, effective if len(names) > 1 else {})
        return self._compute(x, weight, bias, effective.get(names[0]) if len(names) == 1 else None)

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, effective: EffectiveWeight | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def _prepare_training(self, names: list[str]) -> dict[str, EffectiveWeight]:
        """Announce a training forward to the adapters; return the effective weights of those that train by Mix."""
        effective = {}
        for name in names if self.training else ():
            weight = self.trained(name)
            if weight is None or not weight.requires_grad:
                continue
            controller = self.dps_controllers[name]
            # Dense leaves a compiled graph whole; Mix breaks it here.
            if controller.substitutes or not torch.compiler.is_compiling():
                made = _announce(controller, self)
                if made is not None:
                    effective[name] = made
        return effective

    def _home(self) -> torch.device | None:
        """Return the device that W0 is computed with on, if it lies in a file."""
        if self._base.offloaded_from is None:
            return None
        # FSDP2 moves parameters without `_apply`, which is where the layer would notice.
        return next((copy.device for copy in self.dps_weight.values()), self._base.offloaded_from)

    def _call_base(self, *args: Any, **kwargs: Any) -> Any:
        weight = self._base.in_base(self.get_base_layer())[0]
        if self._home() in (None, weight.device):  # at hand, or merged
            return self.base_layer(*args, **kwargs)
        return self._call_base_with(self.pretrained()[0], *args, **kwargs)

    def _call_base_with(self, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer with another weight in place of its own."""
        path, module = self.parameter_name, self.base_layer
        while isinstance(module, DPSLayer):
            path, module = f"base_layer.{path}", module.base_layer
        return functional_call(self.base_layer, {path: weight}, args, kwargs, tie_weights=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._base.apply(self.get_base_layer(), fn, lambda: nn.Module._apply(self, fn, recurse))
        return self

    def _adapters_in_effect(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if self.trained(name) is not None]

    def _effective(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = self._adapters_in_effect()
        return self._combined(names, self._prepare_training(names))

    def _combined(
        self, names: list[str], effective: dict[str, EffectiveWeight] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and bias of one adapter, or W0 plus the deltas of several."""
        effective = effective or {}
        weights: list[Any] = [self.trained(name) for name in names]
        weights = [
            materialize(weight, effective[name]) if name in effective else weight
            for name, weight in zip(names, weights, strict=True)
        ]
        biases = [self.dps_bias[name] for name in names if name in self.dps_bias]
        if len(names) == 1:
            return weights[0], biases[0] if biases else self.pretrained()[1]
        pretrained_weight, pretrained_bias = self.pretrained()
        weight = sum((own - pretrained_weight.to(own.dtype) for own in weights), start=pretrained_weight)
        bias = pretrained_bias
        if pretrained_bias is not None:
            bias = sum((own - pretrained_bias.to(own.dtype) for own in biases), start=pretrained_bias)
        return weight, bias

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version makes new parameters, which forgets requires_grad and rounds fp32 copies to the base's dtype.
        device = device or self._base.offloaded_from or self.pretrained_parameter.device
        for container in (self.dps_weight, self.dps_bias):
            if adapter_name in container and container[adapter_name].device not in (device, torch.device("meta")):
                container[adapter_name].data = container[adapter_name].data.to(device)

    def __repr__(self) -> str:
        return "dps." + super().__repr__()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _announce(controller: Training, layer: DPSLayer) -> EffectiveWeight | None:
    return controller.on_forward(layer)


def _detached_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Merged weights must not share memory with the adapter, and `.to` of the same dtype would.
    return tensor.detach().to(device=like.device, dtype=like.dtype, copy=True)


def cast_to_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cast fp32 master weights to the activation's dtype; autocast does that by itself."""
    if torch.is_autocast_enabled(x.device.type):
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
