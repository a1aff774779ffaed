"""Guards against training engines that update the weights in a way in which DPS cannot take part."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from peft_dps.errors import EngineError
from peft_dps.masking.frozen_bits import bits_of
from peft_dps.training.layer import TargetLayer
from peft_dps.training.weight import TargetWeight

_COPIES = "(DeepSpeed ZeRO, FSDP1, CPU offloading)"


class EngineGuard:
    """Watches one weight of an adapter in its training forwards: does its optimizer reach DPS?

    Once may be a user who loads other weights; twice without a step is an engine that DPS cannot see. Who perturbs
    weights for a forward and restores them, as adversarial training does, comes back to bits that were seen before.
    """

    def __init__(self) -> None:
        self._layer: weakref.ref[TargetLayer] | None = None
        self._version: int | None = None
        self._bits: int | None = None  # of the previous forward, where they were read
        self._known: set[int] = set()  # bits seen since the latest step
        self._step = 0
        self._unseen_changes = 0

    def check_forward(self, adapter: str, layer: TargetLayer, step: int) -> None:
        """Compare the weight with the previous forward's. The first layer to come is the one that is watched."""
        if _is_captured():  # what is captured cannot be read
            return
        if self._layer is None or self._layer() is None:
            self._layer = weakref.ref(layer)
        if self._layer() is not layer:
            return
        weight = layer.trained(adapter)
        if weight is None:
            return
        if self._version is None:
            _refuse_known_engines(adapter, weight)
        version, before = weight._version, self._version
        if step != self._step:
            self._bits, self._known, self._unseen_changes = None, set(), 0
        # Updates through `.data` leave the version counter alone. The bits tell, but reading them waits for the
        # device: once a step has been seen they are read only where the counter has gone on without one.
        if step == 0 or (step == self._step and before is not None and version != before):
            self._count_change(int(bits_of(weight).sum(dtype=torch.int64)), first=before is None)
        self._version, self._step = version, step
        if self._unseen_changes >= (2 if step == 0 else 4):  # the unperturbed bits are read at the second change then
            raise EngineError(
                f"The weights of adapter {adapter!r} were changed twice without an optimizer step that DPS could see, "
                f"so its stages would never happen. The engine updates copies of the weights {_COPIES} "
                "or its optimizer is no torch.optim.Optimizer. Train with a torch optimizer on the "
                "model's own parameters."
            )

    def _count_change(self, bits: int, *, first: bool) -> None:
        if bits == self._bits:
            return
        if bits in self._known:
            self._unseen_changes = 0
        elif not first:
            self._unseen_changes += 1
        self._bits = bits
        self._known.add(bits)


def check_optimizer(optimizer: Optimizer, weights: Iterable[TargetWeight]) -> None:
    """Check that an optimizer applies one gradient a step to weights that DPS knows, and that its hooks run."""
    if _is_captured():
        raise EngineError(
            f"A step of {type(optimizer).__name__} is being captured in a CUDA graph. Its replays would run no hooks, "
            "so no step would be counted and no subnetwork selected. Capture forward and backward pass alone, and "
            "call `step()` outside of the graph."
        )
    if isinstance(optimizer, LBFGS):
        raise EngineError(
            "LBFGS evaluates the gradient several times in one step, so a step has no gradient that DPS could score. "
            "Use an optimizer with one gradient a step, such as torch.optim.AdamW."
        )
    for weight in weights:
        if weight.sharding is None and weight.entries != weight.layer.entries:
            raise EngineError(
                f"The weight of {weight.name!r} is part of a flat shard (FSDP1 or ZeRO-3), and DPS cannot train that. "
                "Shard the model with FSDP2 (`fully_shard`; `fsdp_version: 2` in Accelerate), or use DDP."
            )


def check_observed(weights: Iterable[TargetWeight]) -> None:
    """Check, before a subnetwork is selected, that no weight was changed but by optimizer steps that DPS has seen."""
    for weight in weights:
        is_trained = weight.parameter.requires_grad  # else only who loads values changes it
        if is_trained and weight.observed == 0 and weight.mask is None and weight.was_changed():
            raise EngineError(
                f"The weight of {weight.name!r} was changed, but no optimizer step with its gradient was seen. Its "
                "optimizer works on a copy (CPU offloading, sharding) or is no torch.optim.Optimizer; use one that "
                "steps the model's own parameters."
            )


def refuse_capture(adapter: str) -> None:
    """Refuse a forward with noise, or one that may begin a phase, in a CUDA graph: all replays would be alike."""
    if _is_captured():
        raise EngineError(
            f"A training forward of adapter {adapter!r} is being captured in a CUDA graph. Its replays would repeat "
            "the noise, or the stage, of this one step. Train DPS Mix, Mixout and LT-SFT without CUDA graphs, or use "
            "`variant='dense'`; in compact storage capture once units are selected for good (`schedule='once'`)."
        )


def refuse_part_of_layer(adapter: str) -> NoReturn:
    """Refuse a layer that computes with a part of its weight, of which nothing tells which units it has."""
    raise EngineError(
        f"A layer of adapter {adapter!r} sees a part of its input, output or gradient, and not as ColwiseParallel or "
        "RowwiseParallel leave an `nn.Linear`: with all inputs and a part of the outputs, or a part of the inputs and "
        "all outputs, as plain tensors. DPS does not support other forms of tensor parallelism, such as sequence "
        "parallelism or `use_local_output=False`. Choose one of these plans, or use DDP or FSDP2 (`fully_shard`)."
    )


def refuse_split(adapter: str, what: str) -> None:
    """Refuse an adapter that cannot compute beside a weight of which its process has a part."""
    raise EngineError(
        f"A forward of adapter {adapter!r} computes with a part of a weight, which is tensor parallelism, and has "
        f"{what}. DPS supports compact columns and rows of `nn.Linear` there (`storage='compact'`, "
        "`granularity='column'` or 'row', `train_bias=False`). If `fully_shard` has cut the weight, call the module "
        "that was sharded."
    )


def refuse_unfrozen(adapter: str) -> None:
    """Refuse to train the weights beside an adapter that were frozen before tensor parallelism split them."""
    raise EngineError(
        f"A weight beside adapter {adapter!r}, split by tensor parallelism, would be trained: in older versions of "
        "torch `parallelize_module` forgets that it was frozen. Put the adapter on after the split, or use torch 2.11 "
        "or newer."
    )


def refuse_unseen_steps(adapter: str, steps: int) -> None:
    """Refuse an engine that has made steps of which DPS has seen none."""
    raise EngineError(
        f"The Trainer has made {steps} steps, but DPS has seen none on adapter {adapter!r}. Its engine updates copies "
        f"of the weights {_COPIES}; train with DDP or on one process."
    )


def _is_captured() -> bool:
    """Tell whether work is not done but captured in a CUDA graph, whose replays run no Python."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _refuse_known_engines(adapter: str, weight: torch.Tensor) -> None:
    # Marks that DeepSpeed leaves on parameters: ZeRO-3 the first, ZeRO-1, ZeRO-2 and its bf16 optimizer the second.
    if hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
        raise EngineError(
            f"The weights of adapter {adapter!r} are managed by DeepSpeed (ZeRO-1, 2 or 3, or its bf16 optimizer), "
            "which steps flat fp32 copies of its own that DPS cannot follow. Use FSDP2 (`fully_shard`; "
            "`fsdp_version: 2` in Accelerate), DDP, or ZeRO stage 0 without fp16 and bf16."
        )
    if isinstance(weight, DTensor):  # FSDP2 shows the whole weight to the forward
        raise EngineError(
            f"A forward of adapter {adapter!r} computes with a weight placed as {tuple(weight.placements)}. That is "
            "tensor parallelism, which DPS does not support, or a forward that goes around the hooks of "
            "`fully_shard`; call the module that was sharded."
        )
