"""Drives a recipe in compact storage: evidence from backward passes, units that change before a forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from peft_dps.errors import ConfigError, EngineError, ScoreError
from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.observing import Observe
from peft_dps.selection.evidence import are_finite
from peft_dps.selection.phase import Position
from peft_dps.selection.unit_sums import add_up
from peft_dps.tensors.layout import Layout
from peft_dps.tensors.processes import world
from peft_dps.training.compact_weight import CompactWeight
from peft_dps.training.controller import Controller, in_backward
from peft_dps.training.grad_scaling import PassScale
from peft_dps.training.guards import refuse_capture
from peft_dps.training.layer import TargetLayer
from peft_dps.training.recipe import Recipe
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)
_REMEDY = (
    "Use a smaller `score_steps`, train for more steps, or score before training (`schedule='once'`, `score_steps=0` "
    "and `model.dps_score(batches)`)."
)
_LOADED = (
    "What was loaded since units were selected is from before the selection, as the best checkpoint of "
    "`load_best_model_at_end` may be: but for biases and `modules_to_save` it changes nothing. What was trained is in "
    "later checkpoints. To have units in every one, score before training (`schedule='once'`, `score_steps=0` and "
    "`model.dps_score(batches)`), or use a smaller `score_steps`."
)


class CompactController(Controller):
    """Drives a recipe in compact storage.

    A phase begins with the first training forward of its first step, which has to compute with its units.
    Where the engine shows no optimizer (DeepSpeed, FSDP1), training passes are counted in place of steps.
    """

    weight_class = CompactWeight
    weights: list[CompactWeight]  # type: ignore[assignment]
    _factor: float | None  # of the gradient scaler that calls the step
    _asks: bool  # whether layers have to ask what to do
    _forgot: bool  # whether passes were forgotten since the latest step
    _in_vain: int  # optimizer steps in evaluation mode, in which nothing is scored

    def make_delta(self, layout: Layout, like: torch.Tensor) -> Delta:
        """Make what a compact adapter holds of a weight; see `Controller.make_delta`."""
        recipe = self.recipe
        units = recipe.granularity.units(layout)
        known = units is not None and not (recipe.scope.across or recipe.granularity.spans_weights)
        if units is not None and units.count > torch.iinfo(torch.int32).max:
            raise ConfigError(
                f"A target has {units.count:,} units, and compact storage numbers at most 2^31 - 1. Use larger ones "
                "(`granularity='column'`), `storage='copy'`, or leave it out with `exclude_modules`."
            )
        delta = recipe.granularity.delta(layout, recipe.budget.count(units.count) if known and units else 0, like)
        delta.observes = True
        return delta

    def observer(self, layer: TargetLayer) -> Observe | None:
        """Prepare a forward of a layer; see `Controller.observer`."""
        weight = self._weight_of(layer)
        if self.scores_batches:
            return weight.observe if self._is_trained(weight) else None
        if self.at_rest or not layer.training or not self._is_trained(weight):
            return None
        refuse_capture(self.adapter)
        if not in_backward():  # else gradient checkpointing computes again what a forward has computed
            if weight.forget_thrown_away():
                self._forgot = True
                for each in self.weights:
                    if not each.delta.slots:
                        each.sums.drop()
            self._count_pass(weight)
            before = self.clock.entered
            self._enter_coming_phase()
            if self.clock.entered != before:
                self._see_phase()
        return weight.observe if self.clock.coming().phase.gathers else None

    def _weight_of(self, layer: TargetLayer) -> CompactWeight:
        weight = self._find(layer)
        if not isinstance(weight, CompactWeight):
            raise EngineError(
                f"A copy of a layer of adapter {self.adapter!r} computes a training forward, as torch.nn.DataParallel "
                "makes them, and its gradients cannot be scored. Use DistributedDataParallel, with one process per "
                "device."
            )
        return weight

    def _is_trained(self, weight: CompactWeight) -> bool:
        """Tell whether the adapter is trained; a weight without units may have no gradient all the same."""
        if weight.delta.weight.requires_grad:
            return True
        return weight.is_trained and any(each.delta.weight.requires_grad for each in self.weights if each.exists())

    def _count_pass(self, weight: CompactWeight) -> None:
        """Count the passes since the latest forward as a step, if no optimizer will."""
        if not weight.hides_optimizer:
            return
        if self.recipe.schedule.selects_again:
            raise EngineError(
                f"Adapter {self.adapter!r}: units that are selected anew take their values and optimizer state with "
                "them, and the engine (DeepSpeed ZeRO-1, 2 or 3, FSDP1) keeps these where DPS cannot follow. Use "
                "`schedule='once'`, or train with DDP or FSDP2."
            )
        if weight.optimizers or all(each.sums.pending is None for each in self.weights):
            return
        position, weights = self.clock.coming(), [each for each in self.weights if each.has_gradient]
        self.clock.begin_step(position, {each.name for each in weights})
        self.gather(weights, None, None)
        self.clock.calls += 1

    def begin_call(self, weights: Sequence[TargetWeight], optimizer: Optimizer) -> None:
        """Take note that an optimizer is about to make a step; see `Controller.begin_call`."""
        super().begin_call(weights, optimizer)
        self._in_vain = 0
        for weight in weights:
            if isinstance(weight, CompactWeight):
                weight.see_optimizer(optimizer)

    def see_no_gradient(self, weights: Sequence[TargetWeight]) -> None:
        """Refuse a training in evaluation mode, which would select nothing; see `Controller.see_no_gradient`."""
        trained = [weight.layer for weight in weights if isinstance(weight, CompactWeight) and weight.is_trained]
        if self.at_rest or self.is_selected or not trained or any(layer.training for layer in trained):
            return
        self._in_vain += 1
        if self._in_vain > 1:  # once may be a step that is about another part of the model
            raise EngineError(
                f"Adapter {self.adapter!r}: {self._in_vain} optimizer steps were made in evaluation mode, in which "
                "nothing is scored, so no units would be selected and none trained. Call `model.train()` before the "
                "loop (`peft_dps.disable_dropout(model)` switches dropout off), or score before training "
                "(`schedule='once'`, `score_steps=0` and `model.dps_score(batches)`)."
            )

    def keep_selection(self) -> None:
        """Go on with the units that the adapter has; see `Controller.keep_selection`."""
        going_on = self.recipe.schedule.going_on()
        deltas = [weight.delta for weight in self.weights if weight.exists()]
        waits = any(delta.slots and not delta.is_selected for delta in deltas)
        if going_on is None or waits or self.clock.step or self.clock.entered is not None or not self.is_selected:
            return
        self.clock.go_on_with(going_on)
        for weight in self.weights:
            if weight.exists():
                weight.keep_selection(self.clock.coming().number)
        self._see_phase()

    def _enter_coming_phase(self) -> Position:
        if not self.scores_batches:
            self.keep_selection()
        return super()._enter_coming_phase()

    @property
    def is_selected(self) -> bool:
        """Whether units have been selected; see `Controller.is_selected`."""
        return any(weight.exists() and weight.delta.is_selected for weight in self.weights)

    @property
    def has_to_see_steps(self) -> bool:
        """Whether the optimizer's steps have to reach it from now on: not to train units that stay the same."""
        return self.recipe.schedule.selects_again or not self.is_selected

    def require_selection(self) -> None:
        """Refuse a training that has ended without a selection: it has trained nothing."""
        if self._lost_selection:
            logger.warning("Adapter %r: %s", self.adapter, _LOADED)
        elif not self.is_selected:
            raise ScoreError(
                f"Adapter {self.adapter!r}: training ended after {self.clock.step} steps, before units were selected, "
                f"so nothing was trained. {_REMEDY}"
            )

    def see_saving(self, how: str = "saved") -> None:
        """Warn if a training has begun and no units are selected, so that the adapter changes nothing."""
        if self.is_selected:
            super().see_saving(how)
        elif (cause := self._why_unselected()) is not None:
            logger.warning(
                "Adapter %r is %s without units: it holds nothing that was trained. %s", self.adapter, how, cause
            )

    @property
    def _lost_selection(self) -> bool:
        """Whether units were selected, and what has been loaded since has none."""
        return super().is_selected and not self.is_selected

    def _why_unselected(self) -> str | None:
        """Return why a training has selected nothing so far, and the remedy; None if none has begun."""
        if self._lost_selection:
            return _LOADED
        if self.clock.step:
            return f"None have been selected by step {self.clock.step}. {_REMEDY}"
        if self._in_vain:
            return (
                "An optimizer step was made in evaluation mode, in which nothing is scored. Call `model.train()` "
                "before the loop."
            )
        weights = [weight for weight in self.weights if weight.exists()]
        if any(weight.forgotten or weight.sums.pending is not None for weight in weights):
            return (
                "Backward passes were seen, and no optimizer step over its parameters. Train with a "
                "torch.optim.Optimizer over them, or score before training (`schedule='once'`, `score_steps=0` and "
                "`model.dps_score(batches)`)."
            )
        return None

    def see_caller(self, frame: FrameType) -> None:
        """Take note of a gradient scaler, whose factor is in the evidence, and whose skipped steps may be."""
        if not self.gathers or not self.recipe.evidence.looks:
            return
        self._factor, skipped = self._scaling.read(frame)
        if skipped and not self._forgot:
            for weight in self.weights:
                weight.sums.drop()
            self._count_scored(False)
        self._forgot = False

    def gather(
        self, weights: Sequence[TargetWeight], optimizer: Optimizer | None, grad_scale: torch.Tensor | None
    ) -> None:
        """Take over what the passes of a step have added to the evidence, on all processes, if it is finite."""
        every = [weight for weight in self.weights if weight.exists()]
        for weight in weights:
            weight.observed += int(weight.has_gradient)
        if not self.recipe.evidence.looks:
            return
        # What is beside split layers and whole itself is the same on all processes that share these.
        ranks = next((weight.split.ranks for weight in every if weight.split is not None), None)
        counts = [weight.split is not None or ranks is None or ranks.rank == 0 for weight in every]
        # Before training each process may have another number of batches: they are added up at the end.
        alone = self.scores_batches and ranks is None
        everyone = None if alone else world(every[0].delta.index.device)
        seen = add_up([weight.sums for weight in every], everyone, counts)
        if not seen:
            return
        finite = are_finite([sums.pending for sums in seen if sums.pending is not None])
        for sums in seen:
            if finite:
                sums.fold(self._factor_of(grad_scale))
            else:
                sums.drop()
        self._count_scored(finite)

    def _factor_of(self, grad_scale: torch.Tensor | None) -> float:
        if self._factor is not None:
            return self._factor
        return 1.0 if grad_scale is None else float(grad_scale)

    def after_step(self, weights: Any, optimizer: Optimizer) -> None:
        """Tell the layers, once a step is made, whether the next one has to ask what to do."""
        super().after_step(weights, optimizer)
        self._see_phase()

    def take_clock(self, clock: Any) -> None:
        """Go on from where a clock is."""
        super().take_clock(clock)
        self._scaling, self._factor, self._forgot, self._in_vain = PassScale(), None, False, 0
        self._asks = True
        for weight in self.weights:
            if weight.exists():
                weight.delta.observes = True  # until a forward has asked

    def _see_phase(self) -> None:
        coming = self.clock.coming()
        asks = coming.phase.gathers or coming.number != self.clock.entered
        if asks is self._asks:  # once for a step, however many optimizers it takes
            return
        self._asks = asks
        for weight in self.weights:
            if weight.exists():
                weight.delta.observes = asks

    @property
    def adds_up_batches(self) -> bool:
        """Whether batches have to be added up; those of split layers were, each by itself."""
        return all(weight.split is None for weight in self.weights)

    def see_batches_scored(self) -> None:
        """Select at once; see `Controller.see_batches_scored`."""
        self._enter_coming_phase()
        self._see_phase()


def make_controller(
    adapter: str, recipe: Recipe, total_steps: int | None, besides: Callable[[], int] = int
) -> Controller:
    """Return what drives a recipe, in the storage that it names; see `Controller`."""
    return (CompactController if recipe.storage.compact else Controller)(adapter, recipe, total_steps, besides)
