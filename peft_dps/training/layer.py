"""What the engine needs to know of a layer, and a layer of the engine."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.observing import Observe
from peft_dps.masking.effective_weight import EffectiveWeight
from peft_dps.masking.storage import Storage
from peft_dps.tensors.layout import Layout
from peft_dps.tensors.split import Split


class TargetLayer(Protocol):
    """A layer that computes with the trained weight of an adapter in place of its pretrained one."""

    training: bool
    entries: int

    @property
    def layout(self) -> Layout:
        """Where the rows and columns of the weight are."""

    @property
    def pretrained_parameter(self) -> nn.Parameter:
        """The parameter that holds the pretrained weight W0."""

    @property
    def is_offloaded(self) -> bool:
        """Whether W0 is kept in a file."""

    @property
    def split(self) -> Split | None:
        """How processes that compute a forward together have split W0; None where it is whole."""

    def pretrained_weight(self) -> torch.Tensor:
        """Return W0, on the device of the trained weight."""

    def pretrained_bias(self) -> torch.Tensor | None:
        """Return the pretrained bias."""

    def trained(self, adapter: str) -> nn.Parameter | None:
        """Return an adapter's trained weight, or None."""

    def trained_bias(self, adapter: str) -> nn.Parameter | None:
        """Return the bias that an adapter trains, or None."""

    def pretrained(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W0, on the device of the trained weight, and the pretrained bias."""

    def delta(self, adapter: str) -> Delta | None:
        """Return what a compact adapter holds of the weight; None for an adapter that has a copy of it."""

    def training_of(self, adapter: str) -> Training | None:
        """Return the training that an adapter's weight belongs to."""


class Training(Protocol):
    """What a layer needs to know of the training of one of its adapters."""

    at_rest: bool

    @property
    def needs_forwards(self) -> bool:
        """Whether every training forward has to be announced: it may use effective weights, or begin a phase."""

    @property
    def storage(self) -> Storage:
        """What makes the parameters that are trained."""

    def make_delta(self, layout: Layout, like: torch.Tensor) -> Delta:
        """Make what a compact adapter holds of a weight, in the dtype and on the device of `like`."""

    scores_batches: bool

    def on_forward(self, layer: TargetLayer) -> EffectiveWeight | None:
        """Prepare a training forward of a layer: what to multiply with in place of the weight, None for itself."""

    def observer(self, layer: TargetLayer) -> Observe | None:
        """Prepare a forward of a layer in compact storage: what is to be shown the gradient of its whole weight."""
