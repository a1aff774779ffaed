"""Rewinding: trained parameters become the pretrained ones again, and their optimizers begin anew."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.errors import EngineError, StateError
from peft_dps.tensors.shards import local_part, sharding_of
from peft_dps.training.clock import Clock
from peft_dps.training.layer import TargetLayer
from peft_dps.training.weight import TargetWeight


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


class Rewinding:
    """What the rewinding of an adapter's weights leaves to do: their optimizers begin anew.

    Attributes:
        after: The step after which a forward has rewound them; None if none has.
    """

    def __init__(self) -> None:
        self.after: int | None = None
        self._stale: list[nn.Parameter] = []  # those of which an optimizer may have state of before

    def run(self, weights: Sequence[TargetWeight], step: int) -> None:
        """Rewind weights, after this step; their masks hold from the new values on."""
        self._stale = [parameter for weight in weights for parameter in weight.rewind()]
        self.after = step
        for device in {weight.weight.device for weight in weights if weight.sharding is not None}:
            if device.type != "cpu":  # FSDP2 collects the blocks that are still to come on a stream of its own
                torch.accelerator.synchronize(device)

    def begin_anew(self, optimizer: Optimizer) -> None:
        """Let an optimizer that is about to make a step forget its state of parameters that were rewound."""
        if not self._stale:
            return
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in self._stale:
            if id(parameter) in own:
                optimizer.state.pop(parameter, None)
        self._stale = [parameter for parameter in self._stale if id(parameter) not in own]

    def check_finished(self, step: int, adapter: str) -> None:
        """Refuse to save between the forward that has rewound the weights and the next optimizer step."""
        if self.after == step:
            raise StateError(
                f"Adapter {adapter!r}: a forward has rewound the weights, and the optimizer's state of them is still "
                "that of the phase before. Save the training state after `optimizer.step()`."
            )


def check_rewound(weights: Iterable[TargetWeight], clock: Clock, adapter: str) -> None:
    """Refuse the first step of a phase that rewinds if the gradient of these weights is that of other values."""
    coming = clock.coming()
    if not coming.phase.rewinds or coming.step != 1:
        return
    unseen = next((each.name for each in weights if each.has_gradient and not each.layer.training), None)
    if coming.number != clock.entered:
        what = "there was no forward in training mode"
    elif unseen is not None:
        what = f"the layer {unseen!r} is in eval mode"
    else:
        return
    raise EngineError(
        f"Adapter {adapter!r}: step {clock.step + 1} begins a phase with the pretrained weights, and {what} in which "
        "they could be rewound, so that its gradient is that of other weights. Call `model.train()` before the "
        "forward; dropout can be switched off by `peft_dps.disable_dropout(model)`."
    )
