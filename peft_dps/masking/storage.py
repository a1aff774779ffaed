"""Storages: which parameters hold what is trained of a weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from peft_dps.tensors.registry import Registry


class Storage:
    """A trainable copy of the whole weight: frozen entries are in it, too.

    Attributes:
        compact: Whether the base layer computes with its own weight, and parameters hold the selected units alone.
    """

    compact: ClassVar[bool] = False

    def parameter(self, base: torch.Tensor, *, on_meta: bool, perturb: bool) -> nn.Parameter:
        """Make the parameter that is trained in place of a pretrained tensor."""
        if on_meta:
            return nn.Parameter(torch.empty_like(base, device="meta"))
        copy = base.detach().clone()
        if perturb:
            copy += 0.02 * torch.randn_like(copy)
        return nn.Parameter(copy)


STORAGES: Registry[type[Storage]] = Registry("storage")
STORAGES.register("copy")(Storage)


@STORAGES.register("compact")
class Compact(Storage):
    """Parameters for the selected units alone, see `peft_dps.masking.compact`. Biases are copied."""

    compact = True
