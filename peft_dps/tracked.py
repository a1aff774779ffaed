"""One target weight of an adapter, with what the current stage knows of it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from peft_dps.errors import EngineError
from peft_dps.freezing import frozen_checksum, hold_frozen
from peft_dps.layer import DPSLayer


class TrackedWeight:
    """One target weight of an adapter. It is looked up anew each time, since engines replace parameters.

    Args:
        name: Path of its layer in the base model.
        layer: The layer.
        adapter: Name of the adapter.

    Attributes:
        version: Version counter of the weight when this ACCUMULATE stage began.
        total: Squared gradients added up in this ACCUMULATE stage.
        keep: Mask of this SUBNETWORK stage, int8, -1 where updated.
        held: Bits of the frozen entries, kept with `frozen="exact"`.
        checksum: Checksum of the frozen entries when the stage began, kept with `frozen="gradient"`.
        observed: Steps of this ACCUMULATE stage that brought it a gradient.
        selected: Entries selected at the latest selection.
    """

    def __init__(self, name: str, layer: DPSLayer, adapter: str) -> None:
        self.name = name
        self.adapter = adapter
        self._layer = weakref.ref(layer)  # the layer owns the subnetwork; a cycle would keep dead models in memory
        self.version = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything that the stages of a training leave here."""
        self.total: torch.Tensor | None = None
        self.keep: torch.Tensor | None = None
        self.held: torch.Tensor | None = None
        self.checksum: torch.Tensor | None = None
        self.observed = 0
        self.selected: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _layer=weakref.ref(state["_layer"]))

    @property
    def layer(self) -> DPSLayer:
        """The layer that holds the weight."""
        layer = self._layer()
        if layer is None:
            raise EngineError(f"The layer {self.name!r} of adapter {self.adapter!r} does not exist any more.")
        return layer

    @property
    def weight(self) -> nn.Parameter:
        """The trainable copy."""
        weight: nn.Parameter = self.layer.dps_weight[self.adapter]
        return weight

    @property
    def base_weight(self) -> torch.Tensor:
        """The pretrained weight W0."""
        return self.layer._pretrained()[0]

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient that the optimizer is about to apply.

        Raises:
            EngineError: If it is missing or sparse.
        """
        gradient = self.weight.grad
        if gradient is None:
            raise EngineError(f"The weight of {self.name!r} lost its gradient during the optimizer step.")
        if gradient.layout is not torch.strided:
            raise EngineError(
                f"The gradient of {self.name!r} has layout {gradient.layout}; DPS needs dense gradients. Create the "
                "module with `sparse=False`."
            )
        return gradient

    def frozen_moved(self) -> bool:
        """Tell whether any frozen entry has other bits than when this SUBNETWORK stage began."""
        if self.keep is None:
            return False
        if self.held is not None:
            return not torch.equal(hold_frozen(self.weight, self.keep), self.held)
        return self.checksum is not None and bool(frozen_checksum(self.weight, self.keep) != self.checksum)
