"""Storages: which parameters hold what is trained of a weight."""

from __future__ import annotations

import torch
from torch import nn

from peft_dps.tensors.registry import Registry


class Storage:
    """A trainable copy of the whole weight: frozen entries are in it, too."""

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
