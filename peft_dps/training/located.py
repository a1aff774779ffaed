"""Where a target weight of an adapter is now: its layer, its parameter, and which part of it this process has."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dps.errors import EngineError
from peft_dps.tuner.layers.layer import DPSLayer, Training
from peft_dps.tensors.shards import Ranks, Sharding, local_part, sharding_of

_REFERENCES = ("_layer", "_owner")
UNKNOWN = -1  # version counter of a weight that was copied or unpickled


class LocatedWeight:
    """One target weight of an adapter. It is looked up anew each time, since engines replace parameters.

    Args:
        name: Path of its layer in the base model.
        layer: The layer.
        adapter: Name of the adapter.
        owner: The subnetwork that it belongs to.

    Attributes:
        version: Version counter of the weight when nothing but DPS and its optimizer was to change it any more.
    """

    def __init__(self, name: str, layer: DPSLayer, adapter: str, owner: Training) -> None:
        self.name = name
        self.adapter = adapter
        self.version = UNKNOWN
        # The layer owns the subnetwork; a cycle would keep dead models in memory.
        self._layer: Callable[[], DPSLayer | None] = weakref.ref(layer)
        self._owner: Callable[[], Training | None] = weakref.ref(owner)
        self._sharded: weakref.ref[nn.Parameter] | None = None
        self._sharded_base: weakref.ref[torch.Tensor] | None = None
        self._sharding: Sharding | None = None

    def __getstate__(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("_sharded", "_sharded_base", "_sharding"))
        return {**self.__dict__, **unknown, "version": UNKNOWN, "_layer": self._layer(), "_owner": self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        references = {name: _nothing if state[name] is None else weakref.ref(state[name]) for name in _REFERENCES}
        self.__dict__.update(state, **references)

    def exists(self) -> bool:
        """Tell whether the layer still exists and has the adapter, which may have been deleted, and added anew."""
        layer = self._layer()
        if layer is None or layer.trained(self.adapter) is None:
            return False
        return layer.dps_subnetworks.get(self.adapter) is self._owner()

    @property
    def layer(self) -> DPSLayer:
        """The layer that holds the weight."""
        layer = self._layer()
        if layer is None:
            raise EngineError(
                f"The layer {self.name!r} of adapter {self.adapter!r} does not exist any more. Train with an "
                "optimizer over the parameters that the model has now."
            )
        return layer

    @property
    def parameter(self) -> nn.Parameter:
        """The trainable copy as optimizers hold it: with FSDP2 a DTensor, also while a forward has it as a whole."""
        parameter = self.layer.trained(self.adapter)
        if parameter is None:
            raise EngineError(f"The layer {self.name!r} has no adapter {self.adapter!r} any more.")
        known = None if self._sharded is None else self._sharded()
        if not isinstance(parameter, DTensor):
            return parameter if known is None else known
        if known is not parameter:
            self._sharding = None
            self._sharded, self.version = weakref.ref(parameter), UNKNOWN
            base = self.layer.pretrained_parameter
            self._sharded_base = weakref.ref(base) if isinstance(base, DTensor) else None
        return parameter

    @property
    def sharding(self) -> Sharding | None:
        """How the weight is cut over processes; None if it is whole.

        Raises:
            EngineError: If it is cut in a way that DPS cannot follow.
        """
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return None
        if self._sharding is None:
            if self._sharded_base is not None and self.layer.is_offloaded:
                raise EngineError(
                    f"FSDP2 has cut the pretrained weight of {self.name!r}, which `offload_base` was to keep in a "
                    "file. Pass `ignored_params=peft_dps.offloaded_parameters(model)` to each `fully_shard`, or leave "
                    "`offload_base` out."
                )
            self._sharding = sharding_of(parameter, self.name)
        return self._sharding

    @property
    def ranks(self) -> Ranks | None:
        """The processes that the weight is cut over; None if it is whole."""
        sharding = self.sharding
        return None if sharding is None else sharding.ranks

    @property
    def weight(self) -> torch.Tensor:
        """The trainable copy, or this process's rows of it."""
        return local_part(self.parameter)

    @property
    def entries(self) -> int:
        """Number of entries of the whole weight."""
        return self.parameter.numel()

    @property
    def base_weight(self) -> torch.Tensor:
        """The pretrained weight W0, or this process's rows of it."""
        sharding = self.sharding
        if sharding is None:
            return local_part(self.layer._pretrained()[0])
        known = None if self._sharded_base is None else self._sharded_base()
        if known is not None:
            return local_part(known)
        base = self.layer.pretrained_parameter.data
        return local_part(base) if isinstance(base, DTensor) else sharding.part_of(base).to(self.weight.device)

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient that the optimizer is about to apply, or this process's rows of it.

        Raises:
            EngineError: If it is missing or sparse.
        """
        gradient = self.parameter.grad
        if gradient is None:
            raise EngineError(
                f"The weight of {self.name!r} lost its gradient during the optimizer step. Leave gradients alone in "
                "other step hooks, or register those before importing peft_dps."
            )
        if gradient.layout is not torch.strided:
            raise EngineError(
                f"The gradient of {self.name!r} has layout {gradient.layout}; DPS needs dense gradients. Create the "
                "module with `sparse=False`."
            )
        return local_part(gradient)


def _nothing() -> None:
    """Stand in for the reference to something that is gone."""
