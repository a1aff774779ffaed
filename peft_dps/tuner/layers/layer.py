"""`DPSLayer`: wraps a target module and holds, per adapter, what is trained of its weight and bias."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from peft_dps.errors import TargetError
from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.observing import Observe, observed, observed_weight
from peft_dps.masking.effective_weight import EffectiveWeight, materialize
from peft_dps.tensors.layout import Layout
from peft_dps.tensors.split import Split
from peft_dps.training.guards import refuse_split
from peft_dps.training.layer import Training
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.pretrained import PretrainedWeight
from peft_dps.tuner.peft_interface import BaseTunerLayer, check_adapters_to_merge


class DPSLayer(nn.Module, BaseTunerLayer):
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

    adapter_layer_names: tuple[str, ...] = ("dps_weight", "dps_delta", "dps_bias")
    other_param_names: tuple[str, ...] = ("dps_controllers",)
    base_layer: nn.Module
    in_features: int
    out_features: int
    parameter_name: str = "weight"  # of the weight in the base layer
    bias_name: ClassVar[str | None] = "bias"
    supports_lora: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module, base_weight: PretrainedWeight | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dps_weight = nn.ParameterDict({})
        self.dps_delta = nn.ModuleDict({})
        self.dps_bias = nn.ParameterDict({})
        self.dps_controllers: dict[str, Training] = {}
        self._base = base_weight or PretrainedWeight(self.parameter_name, self.bias_name)
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

    @property
    def unread(self) -> str | None:
        """Why nothing may read the pretrained weight W0, as in "it is quantized"; None if it may be read."""
        return self._base.unread

    @property
    def split(self) -> Split | None:
        """How processes that compute a forward together have split the layer; None where it is whole."""
        return None

    def offload_base(self) -> None:
        """Keep the pretrained weight W0 in a file; whatever needs it reads it from there."""
        self._base.offload(self.get_base_layer())

    def pretrained(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W0, on the device where it is computed with, and the pretrained bias, also while merged."""
        weight, bias = self._base.parameters(self.get_base_layer())
        home = self._home()
        return weight.data if home is None else weight.data.to(home), None if bias is None else bias.data

    def pretrained_weight(self) -> torch.Tensor:
        """Return W0, on the device where it is computed with.

        Raises:
            TargetError: If nothing may read it.
        """
        if self.unread is not None:
            raise TargetError(
                f"The score looks at the pretrained weight of a {type(self.get_base_layer()).__name__}, but "
                f"{self.unread}. Use a score of gradients alone, such as 'squared_gradient', or leave the layer out "
                "with `exclude_modules`."
            )
        return self.pretrained()[0]

    def training_of(self, adapter: str) -> Training | None:
        """Return what drives the training of an adapter."""
        return self.dps_controllers.get(adapter)

    def update_layer(
        self, adapter_name: str, config: DPSConfig, controller: Training, low_cpu_mem_usage: bool = False
    ) -> None:
        """Add an adapter, which begins as the base layer's weight and bias."""
        weight, bias = self.pretrained()
        make, perturb = controller.storage.parameter, not config.init_weights
        if controller.storage.compact:
            like = weight.new_empty((), device="meta" if low_cpu_mem_usage else None)
            self.dps_delta[adapter_name] = delta = controller.make_delta(self.layout, like)
            if perturb and not low_cpu_mem_usage:
                delta.perturb(self.pretrained_weight)
        else:
            self.dps_weight[adapter_name] = make(weight, on_meta=low_cpu_mem_usage, perturb=perturb)
        if bias is not None and config.train_bias:
            split = isinstance(bias, DTensor)
            if split or (bias.is_meta and self.unread is not None):
                raise TargetError(
                    f"`train_bias=True` trains a copy of the bias of a {type(self.get_base_layer()).__name__}, and it "
                    f"is {'split over processes' if split else 'offloaded'}. Use `train_bias=False`."
                )
            self.dps_bias[adapter_name] = make(bias, on_meta=low_cpu_mem_usage, perturb=perturb)
        self.dps_controllers[adapter_name] = controller
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def trained(self, adapter: str) -> nn.Parameter | None:
        """Return an adapter's trainable weight, or None: `dps_weight.get`, for whoever asks many times a step."""
        # `dps_weight[adapter]` is several attribute lookups, each of which fails first: many times as long.
        parameter = self._modules["dps_weight"]._parameters.get(adapter)  # type: ignore[union-attr]
        if parameter is None and (delta := self.delta(adapter)) is not None:
            return delta.weight
        return self.dps_weight.get(adapter) if parameter is None else parameter

    def trained_bias(self, adapter: str) -> nn.Parameter | None:
        """Return the bias that an adapter trains, or None."""
        bias: nn.Parameter | None = self.dps_bias.get(adapter)
        return bias

    def delta(self, adapter: str) -> Delta | None:
        """Return what a compact adapter holds of the weight; None for an adapter that has a copy of it."""
        delta: Any = self._modules["dps_delta"]._modules.get(adapter)  # type: ignore[union-attr]
        return delta  # type: ignore[no-any-return]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what the adapter adds to the pretrained weight.

        Args:
            adapter: Name of the adapter.

        Returns:
            The difference in the adapter's dtype, in the shape and layout of the base weight.
        """
        delta, base = self.delta(adapter), self.pretrained()[0]
        if delta is not None:
            return delta.dense(base)
        weight: torch.Tensor = self.dps_weight[adapter]
        return weight - base.to(weight.dtype)

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
            return self.pretrained()[1]
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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT whether it may approximate the adapter's delta by a LoRA."""
        return self.supports_lora

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
            pretrained: Any = self.pretrained()[1]
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

    def _call_base_on(self, args: Any, kwargs: Any, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._call_base(x, *args, **kwargs)
        return output

    def _home(self) -> torch.device | None:
        """Return the device that W0 is computed with on, if it lies in a file."""
        if self._base.offloaded_from is None:
            return None
        # FSDP2 moves parameters without `_apply`, which is where the layer would notice.
        return next((copy.device for copy in self.dps_weight.values()), self._base.offloaded_from)

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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._base.apply(self.get_base_layer(), fn, lambda: nn.Module._apply(self, fn, recurse))
        return self

    def _adapters_in_effect(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if self.trained(name) is not None]

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
        pretrained = self.pretrained()[1]
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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version makes new parameters, which forgets requires_grad and rounds fp32 copies to the base's dtype.
        device = device or self._base.offloaded_from or self.pretrained_parameter.device
        if (delta := self.delta(adapter_name)) is not None and delta.weight.device.type != "meta":
            delta.to(device)
        for container in (self.dps_weight, self.dps_bias):
            if adapter_name in container and container[adapter_name].device not in (device, torch.device("meta")):
                container[adapter_name].data = container[adapter_name].data.to(device)

    def __repr__(self) -> str:
        return "dps." + super().__repr__()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _announce(controller: Training, layer: DPSLayer) -> EffectiveWeight | None:
    return controller.on_forward(layer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _observer(controller: Training, layer: DPSLayer) -> Observe | None:
    return controller.observer(layer)


def _plus_deltas(base: torch.Tensor, trained: list[Any]) -> torch.Tensor:
    return sum((own - base.to(own.dtype) for own in trained), start=base)


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
