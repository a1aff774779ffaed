"""Rewinding: trained parameters become the pretrained ones again, and their optimizers begin anew."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.tensors.shards import local_part, sharding_of
from peft_dps.training.layer import TargetLayer


class TrackedBias:
    """The bias that is trained with a weight, as optimizers hold it: with FSDP2 a DTensor, also during a forward."""

    def __init__(self) -> None:
        self._sharded: weakref.ref[nn.Parameter] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_sharded": None}

    def find(self, layer: TargetLayer, adapter: str) -> nn.Parameter | None:
        """Return it; None where none is trained."""
        bias: Any = layer.trained_bias(adapter)
        if isinstance(bias, DTensor):
            self._sharded = weakref.ref(bias)  # type: ignore[arg-type]
        known = None if self._sharded is None else self._sharded()
        return bias if known is None else known


@torch.no_grad()
def rewind(parameter: nn.Parameter, seen: torch.Tensor | None, pretrained: torch.Tensor, name: str) -> None:
    """Give a parameter its pretrained values; where it is cut over processes, all of them have to call it.

    Args:
        parameter: The parameter, as optimizers hold it.
        seen: What the layer has in its place now: of a sharded one the whole, for a forward that is under way.
        pretrained: The values, whole or those of this process's rows.
        name: What errors call it.
    """
    sharding, own = sharding_of(parameter, name), local_part(parameter)
    pretrained = local_part(pretrained)
    if sharding is not None and pretrained.shape[0] != sharding.rows:
        pretrained = sharding.part_of(pretrained)
    own.copy_(pretrained)
    if sharding is not None and seen is not None and not isinstance(seen, DTensor):
        seen.detach().copy_(sharding.whole_of(own))


def begin_anew(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Let an optimizer forget its state of parameters; return those that it does not have."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    others = []
    for parameter in parameters:
        if id(parameter) in own:
            optimizer.state.pop(parameter, None)
        else:
            others.append(parameter)
    return others
