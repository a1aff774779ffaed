"""Effective weights of DPS Mix where T and the mask are cut over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peft_dps.masking.effective import AmplifiedWeight, EffectiveWeight
from peft_dps.masking.frozen_bits import zero_frozen_
from peft_dps.masking.mask import Mask
from peft_dps.tensors.shards import Sharding


@dataclass(frozen=True)
class ShardedAmplifiedWeight(EffectiveWeight):
    """SUBNETWORK: W_eff = T + M * (W - T) / density; dL/dW = dL/dW_eff * M.

    Each process computes its rows of W_eff, and all collect them: once in the forward and once in the backward pass.
    Nothing of the whole weight's size stays from one to the other.

    Attributes:
        weight: This process's rows of W.
        snapshot: Its rows of T, the weight when the stage began.
        mask: Its rows of M.
        density: Density of the subnetwork.
        sharding: How the weight is cut.
        masks_gradient: Whether the gradient is masked in the backward pass, for which the mask is collected too.
        rows: Indices of the rows that the forward uses, an embedding's; None for all.
    """

    weight: torch.Tensor
    snapshot: torch.Tensor
    mask: Mask
    density: float
    sharding: Sharding
    masks_gradient: bool
    rows: torch.Tensor | None = None

    def of(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W_eff in the dtype of `weight`, as a new tensor; all processes have to call it."""
        own = AmplifiedWeight(self.snapshot, self.density, self.mask).of(self.weight)
        whole = self.sharding.whole_of(own.to(weight.device, weight.dtype))
        return whole if self.rows is None else whole[self.rows]

    def at(self, rows: torch.Tensor) -> ShardedAmplifiedWeight:
        """Return the same for some rows of the weight."""
        return replace(self, rows=rows)

    def gradient_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Zero the gradient of frozen entries, in place; all processes have to call it."""
        if self.masks_gradient:
            keep = self.sharding.whole_of(self.mask.keep.to(gradient.device))
            zero_frozen_(gradient, Mask.of(keep if self.rows is None else keep[self.rows], in_bits=False))
        return gradient
