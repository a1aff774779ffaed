"""Drives the recipe of one adapter: evidence in some phases, a selection where one begins, masks in others."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from peft_dps.errors import EngineError
from peft_dps.masking.compact.delta import Delta
from peft_dps.masking.compact.observing import Observe
from peft_dps.masking.effective_weight import EffectiveWeight, refuse_transforms
from peft_dps.masking.storage import Storage
from peft_dps.selection.phase import Position, Stage
from peft_dps.tensors.layout import Layout
from peft_dps.tensors.processes import distinct, together
from peft_dps.training import agreement
from peft_dps.training.clock import Clock
from peft_dps.training.copied_weight import CopiedWeight
from peft_dps.training.guards import EngineGuard, check_observed, refuse_capture
from peft_dps.training.layer import TargetLayer
from peft_dps.training.preparation import Preparation
from peft_dps.training.recipe import Recipe
from peft_dps.training.rewinding import Rewinding, check_rewound
from peft_dps.training.scoring import check_dtypes, check_gathered, gather, warn_of_unscored
from peft_dps.training.selecting import Selector
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)


class Controller:
    """Drives the recipe of one adapter.

    It counts steps only when told to by the hooks, and touches weights and gradients only then.

    Args:
        adapter: Name of the adapter.
        recipe: The method.
        total_steps: Number of optimizer steps of the training, if known.
        besides: Returns how many entries are trained besides the weights, whatever is selected of them.

    Attributes:
        weights: The weights of the adapter.
        planned_steps: Number of optimizer steps that the configuration says.
        clock: How far the training is.
        rewinding: What the latest rewinding of its weights has left to do.
        scores_batches: Whether batches are being scored before training.
        at_rest: Whether it is a copy that a Trainer leaves alone, such as TRL's reference: it gets no noise.
    """

    weight_class: ClassVar[type[TargetWeight]] = CopiedWeight
    alive: ClassVar[weakref.WeakSet[Controller]] = weakref.WeakSet()
    generation: ClassVar[int] = 0  # goes on whenever a weight is tracked anew or forgotten, anywhere

    def __init__(
        self, adapter: str, recipe: Recipe, total_steps: int | None = None, besides: Callable[[], int] = int
    ) -> None:
        self.adapter = adapter
        self.besides = besides
        self.recipe = recipe
        self.planned_steps = total_steps
        self.at_rest = False
        self.scores_batches = False
        self.weights: list[TargetWeight] = []
        self.restart(total_steps)
        self._announce()

    def restart(self, total_steps: int | None) -> None:
        """Begin a new training. Only what was scored before it, without a step, belongs to it."""
        before = self.__dict__.get("clock")
        if before is not None and before.step == 0 and before.scored_steps:
            clock = Clock(self.adapter, self.recipe.schedule, total_steps)
            clock.scored_steps, clock.entered = before.scored_steps, before.entered
            self.take_clock(clock)
            return
        self.loaded_after: int | None = None  # the step after which the adapter's weights were loaded
        self.take_clock(Clock(self.adapter, self.recipe.schedule, total_steps))
        for weight in self.weights:
            weight.restart()

    def take_clock(self, clock: Clock) -> None:
        """Go on from where a clock is."""
        self.clock = clock
        self._prepared = Preparation(self.adapter, self.recipe.noise, clock)
        self.rewinding = Rewinding()
        self._by_layer: dict[int, TargetWeight] = {}
        self._guard = EngineGuard()

    def __getstate__(self) -> dict[str, Any]:
        weights = self.weights
        if self.clock.phase_is_over:  # a copy may be asked for its subnetwork before its optimizer makes itself known
            weights = [weight.settled() for weight in weights]
        return {**self.__dict__, "weights": weights, "_guard": EngineGuard(), "_by_layer": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._announce()  # copies and unpickled models train like any other

    def _announce(self) -> None:
        self.alive.add(self)
        Controller.generation += 1

    def track(self, name: str, layer: TargetLayer) -> None:
        """Add the adapter's weight of a layer."""
        self.weights.append(self.weight_class(name, layer, self.adapter, self, self.recipe))
        self._announce()

    @property
    def existing(self) -> list[TargetWeight]:
        """The weights that still exist."""
        return [weight for weight in self.weights if weight.exists()]

    @property
    def storage(self) -> Storage:
        """What makes the parameters that are trained."""
        return self.recipe.storage

    @property
    def needs_forwards(self) -> bool:
        """Whether every training forward has to be announced: it may use effective weights, or begin a phase."""
        return self.recipe.noise.substitutes or self.recipe.schedule.rewinds

    def make_delta(self, layout: Layout, like: torch.Tensor) -> Delta:
        """Make what a compact adapter holds of a weight, in the dtype and on the device of `like`."""
        raise NotImplementedError

    def observer(self, layer: TargetLayer) -> Observe | None:
        """Prepare a forward of a layer in compact storage: what is to be shown the gradient of its whole weight."""
        raise NotImplementedError

    # What the optimizer hooks tell.

    def expect_call(self, weights: Sequence[TargetWeight]) -> None:
        """Get ready for an optimizer that may change weights before it asks for gradients, while a mask holds."""
        if self.clock.entered is None:
            return
        joins = self.clock.joins(weight.name for weight in weights)
        position = self.clock.position if joins else self.clock.coming()
        if position is not None and position.phase.masked and position.number == self.clock.entered:
            self._accept_changes(weights)
            self.before_step(weights)

    def begin_call(self, weights: Sequence[TargetWeight], optimizer: Optimizer) -> None:
        """Take note that an optimizer is about to make a step.

        A logical step may take several optimizers, or one per parameter: a new step begins when a weight comes again.
        """
        self.at_rest = False
        names = {weight.name for weight in weights}
        if self.clock.joins(names):
            self._prepared.check_joins(optimizer, self.rewinding.after)
            self.clock.join(names)
        else:
            check_rewound(weights, self.clock, self.adapter)
            position = self._enter_coming_phase()
            self._prepared.finish(position, self.weights)
            self.clock.begin_step(position, names)
        for weight in weights:
            if weight.frozen is None:
                weight.see_version()

    def see_no_gradient(self, weights: Sequence[TargetWeight]) -> None:
        """Take note of an optimizer step that has no gradient of any of its weights."""

    def see_caller(self, frame: FrameType) -> None:
        """Take note of what calls the optimizer's step, whose frame this is."""

    def take_gradients(
        self, weights: Sequence[TargetWeight], optimizer: Optimizer, grad_scale: torch.Tensor | None
    ) -> None:
        """Gather evidence from gradients, and apply the frozen policy to them."""
        if self.gathers:
            self.gather(weights, optimizer, grad_scale)
        for weight in weights:
            weight.mask_gradient()

    def gather(
        self, weights: Sequence[TargetWeight], optimizer: Optimizer | None, grad_scale: torch.Tensor | None
    ) -> None:
        """Gather evidence from the gradients of a step; without an optimizer they are those of a batch."""
        scored = gather(weights, self.recipe, optimizer, grad_scale)
        if self.recipe.evidence.looks:
            self._count_scored(scored)

    def _count_scored(self, scored: bool) -> None:
        if self.clock.count_scored(scored) and not scored:
            warn_of_unscored(self.adapter, self.clock.step)

    def before_step(self, weights: Iterable[TargetWeight]) -> None:
        """Let the frozen policy get ready for an optimizer."""
        for weight in weights:
            if weight.exists():
                weight.before_step()

    def after_step(self, weights: Iterable[TargetWeight], optimizer: Optimizer) -> None:
        """Let the frozen policy undo what an optimizer has done to frozen entries."""
        self.clock.calls += 1
        for weight in weights:
            if weight.exists():
                weight.after_step(optimizer)

    def _accept_changes(self, weights: Iterable[TargetWeight]) -> None:
        for weight in weights:
            if weight.accept_changes():
                logger.warning(
                    "Adapter %r: frozen entries of %r were changed outside of the optimizer; they are held at their "
                    "new values from now on.",
                    self.adapter,
                    weight.name,
                )

    # What layers tell.

    def on_forward(self, layer: TargetLayer) -> EffectiveWeight | None:
        """Prepare a training forward of a layer."""
        if torch.is_grad_enabled():
            self._guard.check_forward(self.adapter, layer, self.clock.calls)
            if not self.at_rest:
                self.clock.resolve()  # an error of lengths comes before a backward pass is paid for
        if not self.needs_forwards or self.at_rest:
            return None
        noise = self.recipe.noise
        if noise.substitutes:
            refuse_transforms()
        refuse_capture(self.adapter)
        weight = self._find(layer)
        if not isinstance(weight, CopiedWeight):
            raise EngineError(
                f"A copy of a layer of adapter {self.adapter!r} computes a training forward, as torch.nn.DataParallel "
                "makes them; noise and rewinding cannot follow it. Use DistributedDataParallel, with one process per "
                "device."
            )
        # A recomputation in the backward pass (gradient checkpointing) has to see what the forward saw.
        if not self._prepared.is_current and not in_backward():
            self._prepare_forwards()
        position = self._prepared.position
        if position is None or self._prepared.draws(position):
            return noise.noisy(weight)
        weight.follow()
        return noise.amplified(weight)

    def _find(self, layer: TargetLayer) -> TargetWeight | None:
        if not self._by_layer:
            self._by_layer = {id(weight.layer): weight for weight in self.weights}
        return self._by_layer.get(id(layer))

    def _prepare_forwards(self) -> None:
        """Get ready for the forwards of the next step: select its subnetwork, and draw its noise.

        What a mask holds is dropped at the optimizer step only, so that until then its status can be told.
        """
        coming = self.clock.coming()
        if coming.phase.masked:
            self._enter_coming_phase()
        self._forget_dead()
        self._prepared.prepare(coming, self.weights)

    # Phases.

    def _enter_coming_phase(self) -> Position:
        """Make sure that the phase of the coming step has begun, and return the step's position."""
        position = self.clock.coming()
        if position.number != self.clock.entered:
            self._forget_dead()
            self._begin(position)
            self.clock.entered = position.number
            if agreement.is_wanted():
                self.check_ranks_agree()
        return position

    def _begin(self, position: Position) -> None:
        if position.phase.masked:
            self._select(position)
        if position.phase.rewinds:
            self.rewinding.run(self.weights, self.clock.step)
        if position.phase.gathers:
            check_dtypes(self.weights, self.recipe)
            for weight in self.weights:
                weight.begin_gathering()
            self.clock.scored_steps = 0
        if not position.phase.masked:
            for weight in self.weights:
                weight.thaw()

    def _select(self, position: Position) -> None:
        clock, before = self.clock, self.clock.position
        with together(distinct(weight.ranks for weight in self.weights), "Selecting a subnetwork", EngineError):
            check_gathered(self.weights, self.recipe, adapter=self.adapter, step=clock.step, scored=clock.scored_steps)
            # Else no steps were looked at; before the first, DDP writes the values of one process into all.
            if before is not None and before.phase.gathers:
                check_observed(self.weights)
        steps = clock.scored_steps if before is None or before.length is None else before.length
        Selector(
            self.weights,
            self.recipe,
            adapter=self.adapter,
            step=clock.step,
            steps=steps,
            phase=position.number,
            selection=position.cycle,
            besides=self.besides,
        ).run()

    @property
    def adds_up_batches(self) -> bool:
        """Whether what processes have scored before training, each its own batches, has to be added up."""
        return True

    def see_batches_scored(self) -> None:
        """Take note that there are no more batches to score before training."""

    def keep_selection(self) -> None:
        """Begin with what an earlier training has selected, if the adapter has it, and the schedule selects once."""

    @property
    def has_to_see_steps(self) -> bool:
        """Whether the optimizer's steps have to reach it from now on."""
        return True

    def require_selection(self) -> None:
        """Refuse a training that has ended without a selection, if nothing is trained before one."""
        if self.clock.step > 0 and self.recipe.schedule.selects and not self.is_selected:
            logger.warning("Adapter %r: training ended before a subnetwork was selected.", self.adapter)

    def see_saving(self, how: str = "saved") -> None:
        """Warn of what is missing in what is saved or merged, if nobody knew how long it would be trained."""
        clock = self.clock
        if clock.total_steps is not None or not clock.step:
            return
        if self.is_selected or not self.recipe.schedule.selects:
            warning = clock.resolved.warning(clock.step)
        else:
            warning = (
                "no subnetwork has been selected, so all of them trained everything. Use a smaller "
                f"`{self.recipe.schedule.waits_for}`, or train for more steps."
            )
        if warning is not None:
            logger.warning("Adapter %r is %s after %d steps: %s", self.adapter, how, clock.step, warning)

    @property
    def is_selected(self) -> bool:
        """Whether a subnetwork has been selected at least once."""
        return any(weight.selected is not None for weight in self.existing)

    @property
    def gathers(self) -> bool:
        """Whether the phase of the latest step gathers evidence."""
        return self.clock.position is not None and self.clock.position.phase.gathers

    @property
    def stage(self) -> Stage | None:
        """Stage of the latest step; None before the first."""
        return None if self.clock.position is None else self.clock.position.phase.stage

    def check_ranks_agree(self) -> None:
        """Compare steps, masks and weights over all processes; see `agreement.check_agreement`."""
        counted = [self.clock.step, self.clock.scored_steps, self.clock.unscored_steps]
        agreement.check_agreement(self.adapter, counted, self.existing)

    def _forget_dead(self) -> None:
        if not all(weight.exists() for weight in self.weights):
            self.weights = self.existing
            self._by_layer = {}
            self._announce()


def in_backward() -> bool:
    """Tell whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1
