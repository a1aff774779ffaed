"""One target weight of an adapter, with what the current stage knows of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.effective import AmplifiedWeight, EffectiveWeight, NoisyWeight
from peft_dps.errors import EngineError
from peft_dps.freezing import (
    frozen_checksum,
    hold_frozen,
    restore_from_snapshot_,
    restore_frozen_,
    zero_frozen_,
)
from peft_dps.layer import DPSLayer
from peft_dps.masks import Mask
from peft_dps.moments import MomentScores, SecondMoment, second_moments
from peft_dps.scores import score_dtype
from peft_dps.sharded_effective import ShardedAmplifiedWeight
from peft_dps.sharding import Ranks, Sharding, local_part, sharding_of

UNKNOWN = -1  # version counter of a weight that was copied or unpickled


class TrackedWeight:
    """One target weight of an adapter. It is looked up anew each time, since engines replace parameters.

    Where FSDP2 has cut the weight over processes, everything here is this process's part of it.

    Args:
        name: Path of its layer in the base model.
        layer: The layer.
        adapter: Name of the adapter.

    Attributes:
        total: Squared gradients added up in this ACCUMULATE stage.
        moment: In lean mode, how they are made from the optimizer's second moment.
        participation: Steps of this ACCUMULATE stage in which each column took part, `[columns]`, in Mix.
        columns: Which columns take part in the coming step, `[columns]`, in Mix.
        mask: Mask of this SUBNETWORK stage.
        held: Bits of the frozen entries when the stage began, kept with `frozen="exact"` in Dense; in lean mode only
            while the optimizer steps.
        snapshot: The weight when the stage began, kept in Mix.
        checksum: Checksum of the frozen entries when the stage began, kept where nothing else tells whether they move.
        dtype: Dtype of the weight when this SUBNETWORK stage began.
        observed: Steps of this ACCUMULATE stage that brought it a gradient.
        selected: Entries selected at the latest selection.
        version: Version counter of the weight when nothing but DPS and its optimizer was to change it any more.
        changed_outside: Whether something else changed the weight in this SUBNETWORK stage.
    """

    def __init__(self, name: str, layer: DPSLayer, adapter: str) -> None:
        self.name = name
        self.adapter = adapter
        # The layer owns the subnetwork; a cycle would keep dead models in memory.
        self._layer: Callable[[], DPSLayer | None] = weakref.ref(layer)
        self.selected: int | None = None
        self.columns: torch.Tensor | None = None
        self._sharded: weakref.ref[nn.Parameter] | None = None
        self._sharded_base: weakref.ref[torch.Tensor] | None = None
        self._sharding: Sharding | None = None
        self._spare: torch.Tensor | None = None
        self._optimizer: weakref.ref[Optimizer] | None = None
        self.total: torch.Tensor | None = None
        self.held: torch.Tensor | None = None
        self.snapshot: torch.Tensor | None = None
        self.release()

    def release(self) -> None:
        """Forget what the stages leave here, and begin an ACCUMULATE stage."""
        # Scores, frozen bits and snapshots take turns in the same memory.
        self._spare = next((each for each in (self.total, self.held, self.snapshot) if each is not None), None)
        self.total = self.held = self.snapshot = None
        self.moment: MomentScores | None = None
        self.participation: torch.Tensor | None = None
        self.mask: Mask | None = None
        self.checksum: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.observed = 0
        self.changed_outside = False
        self.version = self.parameter._version if self.exists() else UNKNOWN

    def __getstate__(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("_sharded", "_sharded_base", "_sharding", "_spare", "_optimizer"))
        return {**self.__dict__, **unknown, "version": UNKNOWN, "_layer": self._layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layer = state["_layer"]
        self.__dict__.update(state, _layer=_no_layer if layer is None else weakref.ref(layer))

    @property
    def keep(self) -> torch.Tensor | None:
        """The mask of this SUBNETWORK stage in bytes: int8 of the weight's shape, -1 where updated."""
        return None if self.mask is None else self.mask.keep

    def exists(self) -> bool:
        """Tell whether the layer still exists and has the adapter, which may have been deleted or unloaded."""
        layer = self._layer()
        return layer is not None and layer.trained(self.adapter) is not None

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

    def running_total(self) -> torch.Tensor:
        """Return the accumulated squared gradients, zero if there are none yet, on the weight's device."""
        if self.total is None:
            weight = self.weight
            memory = self._memory(score_dtype(weight))
            self.total = memory.zero_() if self.moment is None else self._from_moment(self.moment, memory)
        self._follow_weight()
        return self.total

    def take_total(self) -> torch.Tensor:
        """Return the accumulated squared gradients without keeping them, in lean mode."""
        total, self.total = self.running_total(), None
        return total

    def _from_moment(self, moment: MomentScores, memory: torch.Tensor) -> torch.Tensor:
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            raise EngineError(
                f"`lean=True` takes the scores of {self.name!r} from its optimizer, which does not exist any more. "
                "Keep the optimizer until the stage ends, or use `lean=False`."
            )
        now = second_moments(optimizer, {self.name: self.parameter})[self.name].value
        return memory.zero_() if now is None else moment.scores(now, memory)

    def belongs_to(self, optimizer: Optimizer) -> None:
        """Take note of the optimizer that updates the weight."""
        if self._optimizer is None or self._optimizer() is not optimizer:
            self._optimizer = weakref.ref(optimizer)

    def count_moment(self, now: SecondMoment) -> None:
        """Count a step of this ACCUMULATE stage in lean mode.

        Args:
            now: The second moment before the step.
        """
        if self.moment is None:
            self.moment = MomentScores(now.value, now.share)
        self.moment.count_step(now.decay)

    def count_participation(self) -> None:
        """Count the columns that took part in this step; all of them if the weight was read without noise."""
        if self.participation is None:
            count = self.layer.columns.count
            self.participation = torch.zeros(count, dtype=torch.float32, device=self.weight.device)
        self._follow_weight()
        self.participation += 1.0 if self.columns is None else self.columns.to(self.participation)

    def freeze(
        self, selection: torch.Tensor, selected: int, *, exact: bool, snapshot: bool, lean: bool = False
    ) -> None:
        """Begin a SUBNETWORK stage.

        Args:
            selection: Bool tensor of the weight's shape, True = updated. Its memory is reused.
            selected: Number of entries that are True in it.
            exact: Keep what it takes to give frozen entries their bits back.
            snapshot: Keep the whole weight, for Mix.
            lean: Keep frozen bits only while the optimizer steps.
        """
        self._spare = self._spare if self.total is None else self.total
        self.total = self.participation = self.columns = self.moment = None
        self.selected = selected
        self.mask = Mask.of(selection)
        self.dtype = self.weight.dtype
        if snapshot:
            self.snapshot = self._memory(self.dtype).copy_(self.weight)
        elif exact and not lean:
            self.held = hold_frozen(self.weight, self.mask, self._memory(self.dtype))
        if not exact or (lean and not snapshot):
            self.checksum = frozen_checksum(self.weight, self.mask.keep)
        self._spare = None
        self.version = self.parameter._version

    def _memory(self, dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the weight's shape: that of the stage before, if it fits."""
        weight, spare = self.weight.detach(), self._spare
        self._spare = None
        if spare is not None and spare.nbytes == weight.numel() * dtype.itemsize and _alike(spare, weight):
            return spare.view(dtype)
        return torch.empty_like(weight, dtype=dtype)

    def mask_gradient(self, *, hold: bool = False) -> None:
        """Zero the gradient of frozen entries.

        Args:
            hold: Keep their bits until the optimizer has made its step, in lean mode.
        """
        if self.mask is not None:
            self._follow_weight()
            zero_frozen_(self.gradient, self.mask)
            if hold and self.snapshot is None:
                self.held = hold_frozen(self.weight, self.mask)

    def accept_changes(self) -> bool:
        """Take values that were written from outside since the latest step, such as a loaded state, as they are.

        Returns:
            Whether frozen entries had other values.
        """
        touched = self.mask is not None and self.version not in (UNKNOWN, self.parameter._version)
        self.version = self.parameter._version
        if not touched or self.mask is None or self.checksum is not None or not self.frozen_moved():
            return False  # with the policy "gradient" the optimizer moves frozen entries too
        if self.held is not None:
            self.held = hold_frozen(self.weight, self.mask)
        if self.snapshot is not None:
            restore_from_snapshot_(self.snapshot, self.mask, self.weight)
        self.changed_outside = True
        return True

    def hold(self, *, exact: bool, lean: bool = False) -> None:
        """Give frozen entries back the bits they had when the stage began, if the policy is exact."""
        if self.mask is None:
            return
        self._follow_weight()
        if self.held is not None:
            restore_frozen_(self.weight, self.mask, self.held)
            self.held = None if lean else self.held
        elif exact and self.snapshot is not None:
            restore_from_snapshot_(self.weight, self.mask, self.snapshot)
        self.version = self.parameter._version

    def effective(self, density: float) -> EffectiveWeight | None:
        """Return what a training forward of Mix makes of the weight, or None for the weight itself."""
        if self.columns is not None:  # with masks or without, which the optimizer step that ends a stage will drop
            base, layout = self.layer.pretrained_parameter.data, self.layer.columns
            if isinstance(base, DTensor):
                raise EngineError(
                    f"Mix computes with the pretrained weight of {self.name!r}, which is sharded apart from the "
                    "trained one. Apply `fully_shard` to blocks that hold both, not to base layers."
                )
            columns = self.columns.to(self.layer.dps_weight[self.adapter])  # which is whole in a forward
            return NoisyWeight(base, layout.spread(columns), density, layout.groups)
        if self.mask is not None and self.snapshot is not None:
            self._follow_weight()
            if self.sharding is not None:
                masks = self.checksum is not None  # else the gradient is masked once, at the optimizer step
                return ShardedAmplifiedWeight(self.weight, self.snapshot, self.mask, density, self.sharding, masks)
            # Nothing but the optimizer touched the weight since frozen entries got the bits of T.
            equal = self.checksum is None and self.version == self.parameter._version
            return AmplifiedWeight(self.snapshot, density, None if equal else self.mask)
        return None

    def frozen_moved(self) -> bool:
        """Tell whether any frozen entry has other bits than when this SUBNETWORK stage began."""
        if self.mask is None:
            return False
        if self.changed_outside:
            return True
        self._follow_weight()
        if self.checksum is not None:
            return bool(frozen_checksum(self.weight, self.mask.keep) != self.checksum)
        before = self.held if self.snapshot is None else hold_frozen(self.snapshot, self.mask)
        return before is not None and not torch.equal(hold_frozen(self.weight, self.mask), before)

    def _follow_weight(self) -> None:
        """Follow the weight to another device; refuse another dtype, whose bits would not fit."""
        weight = self.weight
        if self.dtype not in (None, weight.dtype):
            raise EngineError(
                f"The weight of {self.name!r} went from {self.dtype} to {weight.dtype} in the middle of a SUBNETWORK "
                "stage. Convert the model before training, or begin anew with `set_dps_total_steps`."
            )
        for name in ("total", "participation", "columns", "mask", "held", "snapshot", "checksum"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != weight.device:
                setattr(self, name, tensor.to(weight.device))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride() and one.device == other.device


def _no_layer() -> None:
    """Stand in for the reference to a layer that is gone."""
