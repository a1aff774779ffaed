"""One target weight of an adapter, with what the current stage knows of it."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.masking.effective import AmplifiedWeight, EffectiveWeight, NoisyWeight
from peft_dps.errors import EngineError
from peft_dps.masking.frozen_bits import (
    frozen_checksum,
    hold_frozen,
    restore_from_snapshot_,
    restore_frozen_,
    zero_frozen_,
)
from peft_dps.tuner.layers.layer import DPSLayer, Training
from peft_dps.training.located import UNKNOWN, LocatedWeight
from peft_dps.masking.mask import Mask
from peft_dps.selection.moments import MomentScores, SecondMoment, second_moments
from peft_dps.selection.scores import score_dtype
from peft_dps.masking.sharded_effective import ShardedAmplifiedWeight


class TrackedWeight(LocatedWeight):
    """One target weight of an adapter, with what the current stage knows of it.

    Where FSDP2 has cut the weight over processes, everything here is this process's part of it.

    Args:
        name: Path of its layer in the base model.
        layer: The layer.
        adapter: Name of the adapter.
        owner: The subnetwork that it belongs to.
        adds_up_in: `DPSConfig.score_dtype`.

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
        changed_outside: Whether something else changed the weight in this SUBNETWORK stage.
    """

    def __init__(self, name: str, layer: DPSLayer, adapter: str, owner: Training, adds_up_in: str = "float32") -> None:
        super().__init__(name, layer, adapter, owner)
        self._adds_up_in = adds_up_in
        self.selected: int | None = None
        self.columns: torch.Tensor | None = None
        self._exact = False
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

    def restart(self) -> None:
        """Forget everything, and begin a new training."""
        self.release()
        self.selected = self.columns = self._optimizer = self._spare = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_spare": None, "_optimizer": None}

    def with_scores(self) -> TrackedWeight:
        """Return a copy, of the same layer and tensors, that needs no optimizer any more to be selected from."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if self.moment is None or optimizer is None:
            return self
        settled = copy.copy(self)
        settled.total = self.take_total() if self.total is None else self.total
        settled.moment = None
        return settled

    @property
    def keep(self) -> torch.Tensor | None:
        """The mask of this SUBNETWORK stage in bytes: int8 of the weight's shape, -1 where updated."""
        return None if self.mask is None else self.mask.keep

    @property
    def score_dtype(self) -> torch.dtype:
        """Dtype of the accumulated squared gradients."""
        return score_dtype(self.weight, self._adds_up_in)

    @property
    def is_scored(self) -> bool:
        """Whether there is anything to make scores from, or a mask that was made of them."""
        return any(each is not None for each in (self.total, self.moment, self.mask))

    def running_total(self) -> torch.Tensor:
        """Return the accumulated squared gradients, zero if there are none yet, on the weight's device."""
        if self.total is None:
            memory = self._memory(self.score_dtype)
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
        if now is None:
            raise EngineError(
                f"`lean=True` takes scores from the optimizer's second moment, and {type(optimizer).__name__} has "
                f"none of {self.name!r} after its steps. Use torch.optim.AdamW itself, or `lean=False`."
            )
        return moment.scores(now, memory)

    def meet(self, optimizer: Optimizer) -> None:
        """Take note of the first optimizer that updates the weight."""
        if self._optimizer is None:
            self._optimizer = weakref.ref(optimizer)

    def belongs_to(self, optimizer: Optimizer) -> None:
        """Take note of the optimizer that updates the weight.

        Raises:
            EngineError: If another one did so in this ACCUMULATE stage, and scores come from its second moment.
        """
        if self._optimizer is not None and self._optimizer() is optimizer:
            return
        if self._optimizer is not None and self.moment is not None:
            raise EngineError(
                f"`lean=True` takes the scores of {self.name!r} from its optimizer's second moment, and another "
                "optimizer has come in the middle of an ACCUMULATE stage. Keep one for the whole training, or use "
                "`lean=False`. If this one has loaded the other's state, call "
                "`model.load_dps_state_dict(model.dps_state_dict())` to go on with it."
            )
        self._optimizer = weakref.ref(optimizer)

    def count_moment(self, now: SecondMoment) -> None:
        """Count a step of this ACCUMULATE stage in lean mode.

        Args:
            now: The second moment before the step.
        """
        if self.moment is None:
            self.moment = MomentScores(now.value, now.share)
            self._spare = None  # nothing will be summed up in it
        self.moment.count_step(now.decay)

    def count_participation(self) -> None:
        """Count the columns that took part in this step; all of them if the weight was read without noise."""
        if self.participation is None:
            count = self.layer.columns.count
            self.participation = torch.zeros(count, dtype=torch.float32, device=self.weight.device)
        self._follow_weight()
        noisy = self.columns is not None and self.layer.training  # a layer in eval mode computes with all of them
        self.participation += self.columns.to(self.participation) if noisy and self.columns is not None else 1.0

    def freeze(self, mask: Mask, selected: int) -> None:
        """Begin a SUBNETWORK stage; `keep_frozen` has to follow.

        Args:
            mask: Which entries are updated.
            selected: Their number.
        """
        self._spare = self._spare if self.total is None else self.total
        self.total = self.participation = self.columns = self.moment = None
        self.selected, self.mask = selected, mask

    def keep_frozen(self, *, exact: bool, snapshot: bool, lean: bool = False) -> None:
        """Keep what a SUBNETWORK stage needs to know of the weight as it is now.

        Args:
            exact: Keep what it takes to give frozen entries their bits back.
            snapshot: Keep the whole weight, for Mix.
            lean: Keep frozen bits only while the optimizer steps.
        """
        if self.mask is None:
            return
        self._exact, self.dtype = exact, self.weight.dtype
        self.held = self.snapshot = self.checksum = None
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

    def mask_gradient(self) -> None:
        """Zero the gradient of frozen entries."""
        if self.mask is not None:
            self._follow_weight()
            zero_frozen_(self.gradient, self.mask)

    def hold_bits(self) -> None:
        """Keep the bits of frozen entries until the optimizer has made its step, unless they are kept already."""
        if self.mask is not None and self.held is None and self.snapshot is None:
            self._follow_weight()
            self.held = hold_frozen(self.weight, self.mask)

    def accept_changes(self) -> bool:
        """Take values that were written from outside since the latest step, such as a loaded state, as they are.

        Returns:
            Whether frozen entries had other values.
        """
        touched = self.mask is not None and self.version not in (UNKNOWN, self.parameter._version)
        if self.mask is not None:
            self.version = self.parameter._version
        if not touched or self.mask is None or not self._exact or not self._frozen_bits_differ():
            return False  # with the policy "gradient" the optimizer moves frozen entries too
        if self.held is not None:
            self.held = hold_frozen(self.weight, self.mask)
        if self.checksum is not None:
            self.checksum = frozen_checksum(self.weight, self.mask.keep)
        if self.snapshot is not None:
            restore_from_snapshot_(self.snapshot, self.mask, self.weight)
        self.changed_outside = True
        return True

    def follow_changes(self) -> None:
        """Take note of the weight's version in ACCUMULATE, where any change is fine."""
        if self.mask is None:
            self.version = self.parameter._version

    def hold(self, *, exact: bool) -> None:
        """Give frozen entries back the bits they had when the stage began, if the policy is exact."""
        if self.mask is None:
            return
        self._follow_weight()
        if self.held is not None:
            restore_frozen_(self.weight, self.mask, self.held)
            if self.checksum is not None:  # in lean mode that stands in for them until the next step
                self.held = None
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
        return self.changed_outside or self._frozen_bits_differ()

    def _frozen_bits_differ(self) -> bool:
        """Tell whether any has other bits than it is held at, which may be accepted from outside."""
        if self.mask is None:
            return False
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
