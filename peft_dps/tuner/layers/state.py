"""`LayerState`: the base layer, and per adapter what is trained of its weight and bias."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dps.errors import ConfigError, TargetError
from peft_dps.masking.compact.delta import Delta
from peft_dps.tensors.layout import Layout
from peft_dps.tensors.split import Split
from peft_dps.training.layer import Training
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.pretrained import PretrainedWeight
from peft_dps.tuner.peft_interface import BaseTunerLayer


class LayerState(nn.Module, BaseTunerLayer):
    """What a tuner layer holds: the frozen base layer with W0, and the parameters of adapters."""

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
        weight, home = self.pretrained_parameter.data, self._home()
        return weight if home is None else weight.to(home), self.pretrained_bias()

    def pretrained_bias(self) -> torch.Tensor | None:
        """Return the pretrained bias, also while merged."""
        bias = self._base.parameters(self.get_base_layer())[1]
        return None if bias is None else bias.data

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

    def has_changed_bias(self, adapter: str) -> bool:
        """Tell whether the adapter's bias is another one than the pretrained one."""
        bias, pretrained = self.trained_bias(adapter), self.pretrained_bias()
        return bias is not None and pretrained is not None and not torch.equal(bias, pretrained.to(bias.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT whether it may approximate the adapter's delta by a LoRA.

        Raises:
            ConfigError: If the adapter has trained a bias, which PEFT would leave out without a word.
        """
        if self.has_changed_bias(adapter_name):
            raise ConfigError(
                f"A LoRA has no place for biases, and adapter {adapter_name!r} has trained some. Train with "
                "`train_bias=False`, or merge the adapter (`merge_and_unload`)."
            )
        return self.supports_lora

    def _home(self) -> torch.device | None:
        """Return the device that W0 is computed with on, if it lies in a file."""
        if self._base.offloaded_from is None:
            return None
        # FSDP2 moves parameters without `_apply`, which is where the layer would notice.
        return next((copy.device for copy in self.dps_weight.values()), self._base.offloaded_from)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._base.apply(self.get_base_layer(), fn, lambda: nn.Module._apply(self, fn, recurse))
        return self

    def _adapters_in_effect(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if self.trained(name) is not None]

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
