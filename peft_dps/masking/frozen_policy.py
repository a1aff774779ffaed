"""Frozen policies: what becomes of the entries that a mask leaves out, while it holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_dps.errors import EngineError
from peft_dps.masking.frozen_bits import (
    frozen_checksum,
    hold_frozen,
    restore_from_snapshot_,
    restore_frozen_,
    zero_frozen_,
)
from peft_dps.masking.mask import Mask
from peft_dps.tensors.registry import Registry
from peft_dps.tensors.saved_state import SavedState, State


class FrozenWeight:
    """The policy "gradient", for one weight while a mask holds: the gradient of frozen entries is zeroed.

    Momentum and weight decay still move them, as in the code released with the paper. The other policies build on it.

    Args:
        weight: The weight, or this process's rows of it.
        mask: Which of its entries are updated.
        snapshot: The weight when the mask began to hold, where noise computes with it; it may be kept.
        memory: Memory of the weight's shape and dtype that may be kept, or None.
        share: Fraction of the entries of the whole weight that the mask updates.

    Attributes:
        moved_before: Whether something else moved frozen entries, from outside or before a resume.
        holds_bits: Whether frozen entries have the bits of the snapshot after each step.
    """

    holds_bits = False

    def __init__(
        self,
        weight: torch.Tensor,
        mask: Mask,
        snapshot: torch.Tensor | None,
        memory: torch.Tensor | None,
        share: float = 1.0,
    ) -> None:
        self.mask = mask
        self.share = share
        self.snapshot = snapshot
        self.dtype = weight.dtype
        self.moved_before = False
        self.checksum: torch.Tensor | None = None
        self.begin(weight, memory)

    def begin(self, weight: torch.Tensor, memory: torch.Tensor | None) -> None:
        """Keep what tells whether frozen entries move, and what undoes it."""
        self.checksum = frozen_checksum(weight, self.mask.keep)

    def before_step(self, weight: torch.Tensor) -> None:
        """Get ready for an optimizer that is about to move the weight."""

    def mask_gradient_(self, gradient: torch.Tensor) -> None:
        """Change the gradient that the optimizer is about to apply, in place."""
        zero_frozen_(gradient, self.mask)

    def after_step(self, weight: torch.Tensor) -> None:
        """Undo what the optimizer has done to frozen entries."""

    def accept(self, weight: torch.Tensor) -> bool:
        """Take values that were written from outside as they are; tell whether frozen entries were among them."""
        if not self.holds_bits or not self.differs(weight):  # else the optimizer moves them too: there is no telling
            return False
        self.hold(weight)
        self.moved_before = True
        return True

    def hold(self, weight: torch.Tensor) -> None:
        """Hold frozen entries as they are now."""
        self.begin(weight, None)

    def moved(self, weight: torch.Tensor) -> bool:
        """Tell whether any frozen entry has other bits than when the mask began to hold."""
        return self.moved_before or self.differs(weight)

    def differs(self, weight: torch.Tensor) -> bool:
        """Tell whether any frozen entry has other bits than it is held at."""
        return bool(frozen_checksum(weight, self.mask.keep) != self.checksum)

    def follow(self, weight: torch.Tensor, name: str) -> None:
        """Follow the weight to another device; refuse another dtype, whose bits would not fit."""
        if self.dtype != weight.dtype:
            raise EngineError(
                f"The weight of {name!r} went from {self.dtype} to {weight.dtype} in the middle of a SUBNETWORK "
                "stage. Convert the model before training, or begin anew with `set_dps_total_steps`."
            )
        if self.mask.device != weight.device:
            self.mask = self.mask.to(weight.device)
            for field, value in vars(self).items():
                if isinstance(value, torch.Tensor):
                    setattr(self, field, value.to(weight.device))

    def memory(self) -> torch.Tensor | None:
        """Return memory of the weight's shape that is free when the mask holds no more."""
        return self.snapshot

    def state(self, weight: torch.Tensor) -> State:
        """Return what an exact resume needs; what is held is the weight's own, and made anew."""
        tensors = {"mask": self.mask.state()}
        if self.snapshot is not None:
            tensors["snapshot"] = self.snapshot
        return State({"moved": self.moved(weight)}, tensors)


# What makes a `FrozenWeight`, of the same arguments: a subclass of it, or a function that chooses one.
FrozenPolicy = Callable[[torch.Tensor, Mask, torch.Tensor | None, torch.Tensor | None, float], FrozenWeight]
FROZEN: Registry[FrozenPolicy] = Registry("frozen")
FROZEN.register("gradient")(FrozenWeight)


@FROZEN.register("scaled_gradient")
class ScaledGradient(FrozenWeight):
    """The policy "gradient", with a gradient that keeps its mean over random masks: G * M / share.

    So does Child-Tuning_F (Xu et al., EMNLP 2021, arXiv:2109.05687), whose masks are drawn anew in each step.
    """

    def mask_gradient_(self, gradient: torch.Tensor) -> None:
        """Zero the gradient of frozen entries, and divide that of the others by the share of these."""
        super().mask_gradient_(gradient)
        if self.share > 0:  # else all of it is zero
            gradient.div_(self.share)


class HeldBits(FrozenWeight):
    """Frozen entries keep their bits, of which there is a copy."""

    holds_bits = True
    held: torch.Tensor | None = None

    def begin(self, weight: torch.Tensor, memory: torch.Tensor | None) -> None:
        """Copy the bits."""
        self.held = hold_frozen(weight, self.mask, memory)

    def after_step(self, weight: torch.Tensor) -> None:
        """Give frozen entries their bits back."""
        if self.held is not None:
            restore_frozen_(weight, self.mask, self.held)

    def differs(self, weight: torch.Tensor) -> bool:
        """Compare with the copy."""
        return self.held is not None and not torch.equal(hold_frozen(weight, self.mask), self.held)

    def memory(self) -> torch.Tensor | None:
        """Return the memory of the copy."""
        return self.held


class HeldBitsInStep(FrozenWeight):
    """Frozen entries keep their bits, of which there is a copy only while the optimizer steps; else a checksum."""

    holds_bits = True
    held: torch.Tensor | None = None

    def before_step(self, weight: torch.Tensor) -> None:
        """Copy the bits, unless they are copied already."""
        if self.held is None:
            self.held = hold_frozen(weight, self.mask)

    def after_step(self, weight: torch.Tensor) -> None:
        """Give frozen entries their bits back, and drop the copy."""
        if self.held is not None:
            restore_frozen_(weight, self.mask, self.held)
        self.held = None


class HeldBySnapshot(FrozenWeight):
    """Frozen entries keep their bits, which are those of the snapshot."""

    holds_bits = True

    def begin(self, weight: torch.Tensor, memory: torch.Tensor | None) -> None:
        """Keep nothing more: the snapshot has all."""

    def after_step(self, weight: torch.Tensor) -> None:
        """Give frozen entries their bits back."""
        if self.snapshot is not None:
            restore_from_snapshot_(weight, self.mask, self.snapshot)

    def hold(self, weight: torch.Tensor) -> None:
        """Let the snapshot have the frozen entries as they are now."""
        if self.snapshot is not None:
            restore_from_snapshot_(self.snapshot, self.mask, weight)

    def differs(self, weight: torch.Tensor) -> bool:
        """Compare with the snapshot."""
        if self.snapshot is None:
            return False
        return not torch.equal(hold_frozen(weight, self.mask), hold_frozen(self.snapshot, self.mask))


@FROZEN.register("exact")
def exact(
    weight: torch.Tensor, mask: Mask, snapshot: torch.Tensor | None, memory: torch.Tensor | None, share: float
) -> FrozenWeight:
    """Keep the bits of frozen entries, whatever the optimizer does."""
    return (HeldBits if snapshot is None else HeldBySnapshot)(weight, mask, snapshot, memory, share)


@FROZEN.register("exact_in_step")
def exact_in_step(
    weight: torch.Tensor, mask: Mask, snapshot: torch.Tensor | None, memory: torch.Tensor | None, share: float
) -> FrozenWeight:
    """Keep the bits of frozen entries, with a copy of them only while the optimizer steps."""
    return (HeldBitsInStep if snapshot is None else HeldBySnapshot)(weight, mask, snapshot, memory, share)


def load_frozen(
    policy: FrozenPolicy, saved: SavedState, weight: torch.Tensor, share: float, *, with_snapshot: bool
) -> FrozenWeight:
    """Freeze a weight as it was when a state was saved."""
    state = saved.tensor("mask", Mask.state_shape(weight.shape), torch.uint8).to(weight.device, copy=True)
    snapshot = None
    if with_snapshot:
        snapshot = saved.tensor("snapshot", weight.shape, weight.dtype).to(weight.device, copy=True)
    frozen = policy(weight, Mask.load(state, weight.shape), snapshot, None, share)
    frozen.moved_before = saved.flag("moved")
    return frozen
