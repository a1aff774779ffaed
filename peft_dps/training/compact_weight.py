"""A target weight of which an adapter holds selected units alone."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.errors import EngineError, StateError
from peft_dps.masking.compact.delta import Delta, set_values
from peft_dps.masking.frozen_bits import checksum
from peft_dps.masking.mask import Mask
from peft_dps.selection.scores import ScoreContext, is_per_unit
from peft_dps.selection.unit_sums import UnitSums
from peft_dps.tensors.layout import Units
from peft_dps.tensors.processes import world
from peft_dps.tensors.saved_state import SavedState, State
from peft_dps.tensors.split import Split
from peft_dps.training.guards import refuse_part_of_layer
from peft_dps.training.optimizer_slots import move_slots, refuse_early_state, refuse_state
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)
_LOST = 32  # more than a gradient scaler skips in a row until its scale fits


class CompactWeight(TargetWeight):
    """A target weight of which an adapter trains selected units alone.

    Attributes:
        forgotten: Times that what passes had added was forgotten since the latest optimizer step.
        optimizers: Those that have made a step with it.
        idle: Whether it has no units to train for the time being, and is frozen only until it has some.
        split: How the layer was split over processes when its gradient was last seen; None if it was whole.
        moved: Per slot, the one that its optimizer state is in, -1 for none; None where they are as they were.
    """

    takes_masks = False
    idle = False
    split: Split | None

    @property
    def delta(self) -> Delta:
        """What the adapter holds of the weight."""
        delta = self.layer.delta(self.adapter)
        if delta is None:
            raise EngineError(f"The layer {self.name!r} has no adapter {self.adapter!r} any more.")
        return delta

    @property
    def entries(self) -> int:
        """Number of entries of the whole weight."""
        return self.layer.entries

    @property
    def sums(self) -> UnitSums:
        """The evidence of this phase."""
        return self.gathered  # type: ignore[return-value]

    @property
    def is_trained(self) -> bool:
        """Whether its units are to be trained, once it has some: not those that someone has frozen by hand."""
        return self.delta.weight.requires_grad or self.idle

    @property
    def selected_now(self) -> int | None:
        """Entries of the units that the adapter has; see `TargetWeight.selected_now`."""
        if self.selected is not None or not self.delta.is_selected:
            return self.selected
        return self.delta.slots * self.sums.units.size

    def observe(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Look at the gradient of the whole weight, in the backward pass of its layer; see `UnitSums.add`."""
        if gradient.shape == self.sums.units.shape:
            self.split = None
            return self.sums.add(gradient)
        self.split = self.layer.split
        if self.split is None:
            refuse_part_of_layer(self.adapter)
        seen = self.sums.add(gradient, self.split)
        return None if seen is None else self.split.sum(seen)  # NaN for all

    @property
    def hides_optimizer(self) -> bool:
        """Whether an engine steps something else than the parameter: flat copies, of DeepSpeed or FSDP1."""
        parameter: Any = self.layer.trained(self.adapter)
        marked = any(hasattr(parameter, mark) for mark in ("ds_id", "_hp_mapping", "_fsdp_flattened"))
        return marked or not isinstance(parameter, nn.Parameter)

    def forget_thrown_away(self) -> bool:
        """Forget passes whose gradients were thrown away without a step, as after one that a gradient scaler skips."""
        if self.sums.pending is None or self.hides_optimizer or self.sharding is not None:  # which move gradients
            return False
        parameter = self.parameter
        if not parameter.requires_grad or parameter.grad is not None:
            return False
        self.sums.drop()
        self.forgotten += 1
        if self.forgotten == _LOST and not self.optimizers:
            logger.warning(
                "The gradients of adapter %r were thrown away %d times without an optimizer step that DPS could see. "
                "If this is a training, its engine steps copies of the parameters (DeepSpeed stage 0 with bf16), "
                "and no units will be selected: use another engine or stage, or select before the model is wrapped "
                "(`schedule='once'`, `score_steps=0` and `model.dps_score(batches)`).",
                self.adapter,
                self.forgotten,
            )
        return True

    @property
    def has_gradient(self) -> bool:
        """Whether the coming optimizer step has a gradient of it, or one of the whole weight has been seen."""
        return self.sums.pending is not None or super().has_gradient

    @property
    def score_ranks(self) -> None:
        """None: each process has all scores, which have been added up over all of them."""
        return None

    @property
    def choice(self) -> torch.Tensor:
        """What tells which entries are updated: the numbers of the units."""
        return self.delta.index

    def state(self, *, ends: bool) -> State:
        """Return what an exact resume needs; which units are trained is in the adapter's own file."""
        if self.moved is not None and self.is_trained:
            raise StateError(
                f"Units of {self.name!r} have been selected anew, and the optimizer's state of them follows at its "
                "next step. Save the training state after `optimizer.step()`."
            )
        return super().state(ends=ends) | State({"masked": False, "units": checksum(self.delta.index)})

    def read_evidence(self, saved: SavedState) -> UnitSums:
        """Return the evidence that a saved state holds."""
        if saved.fact("units") != checksum(self.delta.index):
            raise saved.damaged("it is that of other units than the adapter trains; load its file of weights first")
        return self.begin_evidence().load(saved, self.delta.index.device)

    def entry_mask(self) -> torch.Tensor | None:
        """Return which entries are updated; see `TargetWeight.entry_mask`."""
        if not self.delta.is_selected and self.selected is None:
            return None
        units = self.sums.units
        chosen = torch.zeros(units.count, dtype=torch.bool, device=self.delta.index.device)
        chosen[self.delta.index.long()] = True
        return units.expand(chosen)

    def restart(self) -> None:
        """Forget evidence, and begin a new training; units that have been selected stay until others are."""
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.moved: torch.Tensor | None = None
        self.split = None
        self.forgotten = 0
        self._shape_before = torch.Size()  # of the parameter at the latest step, where `moved` is not None
        super().restart()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": None, "split": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "optimizers": weakref.WeakSet()})

    def begin_evidence(self) -> UnitSums:
        """Return evidence of which nothing has been gathered yet."""
        units = self.recipe.granularity.units(self.layer.layout)
        power = self.recipe.evidence.power if self.recipe.evidence.looks else None
        return UnitSums(units or self.layer.layout.whole, power)

    def score_context(self, generator: torch.Generator, steps: int) -> ScoreContext:
        """Return what a score may look at: the sums of units; the weight, if it needs more than they are."""
        sums, device = self.sums, self.delta.index.device
        if not self.recipe.evidence.looks and not is_per_unit(self.recipe.score_name):
            weight = self._whole_weight()
            return ScoreContext(gathered=None, weight=weight, load_base=self._whole_base, generator=generator)
        total = sums.total
        if sums.power is not None:
            total = sums.zeros(device) if total is None else total.to(device)
        shape = sums.zeros(torch.device("meta")).shape
        alike = torch.empty((), device=device).expand(shape)
        return ScoreContext(gathered=total, weight=alike, load_base=self._whole_base, generator=generator)

    def _whole_base(self) -> torch.Tensor:
        """Return W0, with the rows of all processes."""
        base = self.layer.pretrained_weight()
        return base.full_tensor() if isinstance(base, DTensor) else base

    def _whole_weight(self) -> torch.Tensor:
        """Return W0 + D."""
        if self.delta.parts() and self.sharding is not None:
            raise EngineError(
                f"The score {self.recipe.score_name!r} looks at the weight of {self.name!r}, whose units FSDP2 has "
                "cut over processes. Select once (`schedule='once'`), or use `storage='copy'`."
            )
        return self.delta.applied(self._whole_base()).detach()

    def limited(self, scores: torch.Tensor) -> torch.Tensor:
        """Leave scores to so many units that are new as the adapter may still hold; see `TargetWeight.limited`."""
        most = self.recipe.budget.most_held(self.sums.units.count)
        held, flat = self.delta.held.long(), scores.reshape(-1)
        if most is None:
            return scores
        new = flat.clone()
        new[held] = -1.0
        room = max(0, most - len(held))
        best = new.topk(min(room, max(0, len(new) - len(held)))).indices
        kept = torch.zeros_like(flat)
        kept[held] = flat[held].clamp(min=torch.finfo(flat.dtype).tiny)  # before all that there is no room for
        kept[best] = flat[best]
        return kept.view(scores.shape)

    def unit_sums(self, units: Units, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of units, times their size where these are no sums; those of entries are added up."""
        if scores.numel() != units.count:
            return self.limited(units.sums(scores))
        return self.limited(scores.double() * (1 if self.recipe.evidence.looks else units.size))

    def choose(self, choice: torch.Tensor, units: Units, phase: int) -> None:
        """Begin a phase in which the chosen units are updated; see `TargetWeight.choose`."""
        delta, trained = self.delta, self.is_trained
        numbers = choice.view(-1).nonzero().view(-1).to(delta.index.device, torch.int32)
        if delta.is_selected:
            self._exchange(delta, numbers)
        else:
            self._require_room(delta, len(numbers))
            delta.take(numbers, self.layer.pretrained_weight)
        self._begin(trained, phase)
        self.drop_evidence()

    def keep_selection(self, phase: int) -> None:
        """Begin a phase in which the units are updated that the adapter has."""
        self._begin(self.is_trained, phase)

    def _begin(self, trained: bool, phase: int) -> None:
        slots = self.delta.slots
        # Engines refuse parameters without entries. But an optimizer has to hold those that get units later.
        self.idle = trained and not slots and not self.recipe.schedule.selects_again
        self.delta.weight.requires_grad_(trained and not self.idle)
        self.selected, self.masked_in = slots * self.sums.units.size, phase

    def choose_entries(self, mask: Mask, selected: int, phase: int) -> None:
        """Begin a phase in which the chosen entries are updated; see `TargetWeight.choose_entries`."""
        self.choose(mask.keep.bool(), self.sums.units, phase)

    def choose_all(self, phase: int) -> None:
        """Begin a phase in which all units are updated."""
        units = self.sums.units
        self.choose(torch.ones(units.count, dtype=torch.bool, device="cpu"), units, phase)

    def _require_room(self, delta: Delta, slots: int) -> None:
        """Check that another number of units may be trained than the parameter was made for."""
        owner = self._owner()
        before_wrapping = owner is not None and owner.scores_batches
        several = world(delta.index.device) is not None and not before_wrapping
        if slots != delta.slots and (several or self.sharding is not None or self.hides_optimizer):
            raise EngineError(
                f"The weight of {self.name!r} is to have {slots} units, and the engine took note of "
                f"its parameter with {delta.slots}. Select before the model is wrapped (`score_steps=0` and "
                "`model.dps_score(batches)`), or use `scope='tensor'`."
            )
        if slots != delta.slots and not delta.is_selected:
            for optimizer in self.optimizers:
                refuse_early_state(optimizer, self.parameter, self.name)

    @torch.no_grad()
    def _exchange(self, delta: Delta, numbers: torch.Tensor) -> None:
        """Let units that stay keep their slots and values; keep the values of those that leave."""
        self._require_room(delta, len(numbers))
        if self.hides_optimizer:
            raise EngineError(
                f"The adapter {self.adapter!r} has units already, and others would be selected, but the engine "
                "(DeepSpeed ZeRO-1, 2 or 3, FSDP1) keeps values and optimizer state where DPS cannot follow. Go on "
                "from its training state, or train with DDP or FSDP2."
            )
        slots = delta.slots
        before = self.parameter.shape if self.moved is None else self._shape_before
        for optimizer in self.optimizers:
            refuse_state(optimizer, self.parameter, before, self.name)
        self._shape_before = before
        moved = delta.exchange(numbers, self.layer.pretrained_weight, self._write)
        if len(moved) == slots and torch.equal(moved, torch.arange(slots, device=moved.device)):
            return  # all of them stay
        self.moved = moved if self.moved is None else torch.where(moved >= 0, self.moved[moved.clamp(min=0)], moved)

    def _write(self, values: torch.Tensor) -> None:
        """Write the values of all units, or this process's part of them, into the parameter."""
        sharding = self.sharding
        if sharding is not None:
            self.weight.copy_(sharding.part_of(values))
            collected = self.layer.trained(self.adapter)
            if collected is not None and not isinstance(collected, DTensor):  # for a forward that is under way
                collected.detach().copy_(values)
        else:
            set_values(self.parameter, values)

    def see_optimizer(self, optimizer: Optimizer) -> None:
        """Take note of an optimizer that is about to make a step, and let its state follow units to their slots."""
        self.optimizers.add(optimizer)
        self.forgotten = 0
        if self.moved is not None:
            refuse_state(optimizer, self.parameter, self._shape_before, self.name)
            move_slots(optimizer, self.parameter, self._shape_before, self.moved, self.delta.axis, self.sharding)
            self.moved = None

    def mask_gradient(self) -> None:
        """Leave no gradient to the optimizer where nothing has been selected yet, so that it makes no state."""
        if not self.delta.is_selected:
            self.parameter.grad = None

    def has_moved(self) -> bool:
        """Tell whether the adapter adds anything to the pretrained weight."""
        return any(bool(values.detach().count_nonzero()) for values, _ in self.delta.parts())
