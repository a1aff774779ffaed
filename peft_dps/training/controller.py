"""The weights of one adapter, the stage they are in, and what that stage knows of them: scores, or masks."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from peft_dps.training import agreement
from peft_dps.training.canary import Canary
from peft_dps.training.clock import Clock
from peft_dps.tuner.config import DPSConfig
from peft_dps.masking.effective import EffectiveWeight
from peft_dps.errors import EngineError
from peft_dps.training.gathering import check_gathered, gather
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.masking.noise import ColumnNoise
from peft_dps.training.ranking import check_dtypes
from peft_dps.selection.schedule import Position, Stage
from peft_dps.selection.scores import find_score
from peft_dps.tensors.shards import distinct, together
from peft_dps.training.switch import select_subnetwork
from peft_dps.training.weight import TrackedWeight

logger = logging.getLogger(__name__)


class Subnetwork(Clock):
    """Drives the stages of one adapter: scores in ACCUMULATE, selection at the switch, masks in SUBNETWORK.

    It counts steps only when told to by the bridge, and touches weights and gradients only then.

    Args:
        adapter: Name of the adapter.
        config: Its configuration.
    """

    alive: ClassVar[weakref.WeakSet[Subnetwork]] = weakref.WeakSet()
    generation: ClassVar[int] = 0  # goes on whenever a weight is tracked anew or forgotten, anywhere

    def __init__(self, adapter: str, config: DPSConfig) -> None:
        self.at_rest = False  # a copy that a Trainer leaves alone, such as TRL's reference: Mix adds no noise to it
        self.weights: list[TrackedWeight] = []
        super().__init__(adapter, config)
        self._announce()

    def restart(self, total_steps: int | None) -> None:
        """Forget scores, masks and steps, and begin a new training.

        Args:
            total_steps: Number of optimizer steps of that training, if known.
        """
        super().restart(total_steps)
        self.calls = 0
        self._prepared_for: int | None = None
        self._warned = False  # of steps without a training forward
        self._noise: ColumnNoise | None = None
        self._by_layer: dict[int, TrackedWeight] = {}
        self._canary = Canary()
        for weight in self.weights:
            weight.restart()

    def __getstate__(self) -> dict[str, Any]:
        weights = self.weights
        if self.stage_is_over:  # a copy may be asked for its subnetwork before its optimizer makes itself known
            weights = [weight.with_scores() for weight in weights]
        return {**self.__dict__, "weights": weights, "_canary": Canary(), "_by_layer": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._announce()  # copies and unpickled models train like any other

    def _announce(self) -> None:
        self.alive.add(self)
        Subnetwork.generation += 1

    def track(self, name: str, layer: DPSLayer) -> None:
        """Add the adapter's weight of a layer.

        Args:
            name: Path of the layer in the base model.
            layer: The layer, whose copy of this adapter exists already.
        """
        self.weights.append(TrackedWeight(name, layer, self.adapter, self, self.config.score_dtype))
        self._announce()

    @property
    def is_mix(self) -> bool:
        """Whether training forwards use effective weights."""
        return self.config.is_mix

    def expect_call(self, weights: Sequence[TrackedWeight]) -> None:
        """Get ready for an optimizer that may change weights before it asks for gradients, in SUBNETWORK.

        Args:
            weights: Tracked weights that belong to the optimizer.
        """
        if self._entered is not Stage.SUBNETWORK:
            return
        joins = self._joins(weight.name for weight in weights)
        position = self.position if joins else self._timetable().at(self.step + 1)
        if position is not None and position.stage is Stage.SUBNETWORK:
            self._accept_changes(weights)
            self.hold_bits(weights)

    def begin_call(self, weights: Sequence[TrackedWeight], optimizer: Optimizer) -> None:
        """Take note that an optimizer is about to make a step.

        A logical step may take several optimizers, or one per parameter: a new step begins when a weight comes again.

        Args:
            weights: Tracked weights that belong to the optimizer, with a gradient or without.
            optimizer: The optimizer.
        """
        self.at_rest = False
        for weight in weights:
            weight.meet(optimizer)
        names = {weight.name for weight in weights}
        if self._joins(names):
            self._check_forwards(optimizer)
            self._in_round |= names
        else:
            self._begin_step(names)
        for weight in weights:
            weight.belongs_to(optimizer)
            weight.follow_changes()

    def _begin_step(self, names: set[str]) -> None:
        self.position = self._enter_next_stage()
        if self._prepared_for != self.step:  # no training forward of this step drew noise for it
            for weight in self.weights:
                weight.columns = None
            self._warn_of_no_forward()
        self.step += 1
        self.config.is_to_be_filled = False  # what the weights hold from now on is trained here
        self._in_round = names
        self._counted = set()

    def _check_forwards(self, optimizer: Optimizer) -> None:
        """Refuse a second optimizer of a step after a forward that Mix has prepared for the next one."""
        if self.is_mix and self._prepared_for == self.step:
            raise EngineError(
                f"Adapter {self.adapter!r}: {type(optimizer).__name__} is another optimizer of step {self.step}, and "
                "there was a training forward since the first one. DPS Mix computes that with the noise of the next "
                "step. Step all optimizers after the same forward and backward, or use `variant='dense'`."
            )

    def _warn_of_no_forward(self) -> None:
        if self.is_mix and not self._warned and self.position is not None and self.position.stage is Stage.ACCUMULATE:
            self._warned = True
            logger.warning(
                "Adapter %r: DPS Mix makes a step without any forward in training mode, so there is no noise in it, "
                "and it is a step of DPS Dense. Call `model.train()`; dropout can be switched off by "
                "`peft_dps.disable_dropout(model)`.",
                self.adapter,
            )

    def take_gradients(
        self, weights: Sequence[TrackedWeight], optimizer: Optimizer, grad_scale: torch.Tensor | None
    ) -> None:
        """Score the gradients in ACCUMULATE; zero those of frozen entries in SUBNETWORK.

        Args:
            weights: Tracked weights that have a gradient.
            optimizer: The optimizer that is about to update them.
            grad_scale: Factor that a gradient scaler has left in the gradients, or None.
        """
        if self._entered is Stage.ACCUMULATE:
            for weight in weights:
                weight.observed += 1
            if find_score(self.config.score).uses_gradients:
                self._count_scored(gather(weights, self.config, optimizer, grad_scale))
            return
        for weight in weights:
            weight.mask_gradient()

    def hold_bits(self, weights: Iterable[TrackedWeight]) -> None:
        """Keep the bits of frozen entries for this step, in lean mode with the policy `"exact"`."""
        if self.config.lean and self.config.frozen == "exact":
            for weight in weights:
                if weight.exists():
                    weight.hold_bits()

    def _accept_changes(self, weights: Iterable[TrackedWeight]) -> None:
        """Take values that were written from outside since the latest step, such as a loaded state, as they are."""
        for weight in weights:
            if weight.accept_changes():
                logger.warning(
                    "Adapter %r: frozen entries of %r were changed outside of the optimizer; they are held at their "
                    "new values from now on.",
                    self.adapter,
                    weight.name,
                )

    def hold(self, weights: Iterable[TrackedWeight]) -> None:
        """Give frozen entries back the bits they had when the stage began, if the policy is `"exact"`."""
        self.calls += 1
        for weight in weights:
            if weight.exists():
                weight.hold(exact=self.config.frozen == "exact")

    def on_forward(self, layer: DPSLayer) -> EffectiveWeight | None:
        """Prepare a training forward of a layer.

        Args:
            layer: The layer.

        Returns:
            What Mix multiplies with in place of the weight; None for the weight itself.

        Raises:
            EngineError: If the weights change from forward to forward while the bridge is shown no step.
        """
        if torch.is_grad_enabled():
            self._canary.check(self.adapter, layer, self.calls)
        if not self.is_mix or self.at_rest:
            return None
        # A recomputation in the backward pass (gradient checkpointing) has to see what the forward saw.
        if self._prepared_for != self.step and not in_backward():
            self._prepare_mix()
        if not self._by_layer:
            self._by_layer = {id(weight.layer): weight for weight in self.weights}
        tracked = self._by_layer.get(id(layer))
        if tracked is None:
            raise EngineError(
                f"A copy of a layer of adapter {self.adapter!r} computes a training forward, as torch.nn.DataParallel "
                "makes them; DPS Mix cannot follow it. Use DistributedDataParallel, with one process per device."
            )
        return tracked.effective(self.config.density)

    def _prepare_mix(self) -> None:
        """Get ready for the forwards of the next step: select the subnetwork, or draw the step's column noise.

        What SUBNETWORK holds is dropped at the optimizer step only, so that until then its status can be told.
        """
        coming = self._timetable().at(self.step + 1).stage
        if coming is Stage.SUBNETWORK:
            self._enter_next_stage()
        else:
            self._forget_dead()
            density = self.config.density
            if self._noise is None or self._noise.density != density:
                counts = [weight.layer.columns.count for weight in self.weights]
                self._noise = ColumnNoise(self.config.seed, counts, density)
            rows: dict[torch.device, tuple[torch.Tensor, ...]] = {}
            for index, weight in enumerate(self.weights):
                device = weight.parameter.device
                if device not in rows:
                    rows[device] = self._noise.draw(self.step + 1, device)
                weight.columns = rows[device][index]
        self._prepared_for = self.step

    def _enter_next_stage(self) -> Position:
        """Make sure that the stage of the next step has begun, and return the step's position."""
        position = self._timetable().at(self.step + 1)
        if position.stage is not self._entered:
            self._forget_dead()
            if position.stage is Stage.SUBNETWORK:
                self._select()
            else:
                check_dtypes(self.weights, self.config)
                for weight in self.weights:
                    weight.release()
                self.scored_steps = 0
            self._entered = position.stage
            if agreement.is_wanted():
                self.check_ranks_agree()
        return position

    def _select(self) -> None:
        weights, adapter, step = self.weights, self.adapter, self.step
        with together(distinct(weight.ranks for weight in weights), "Selecting a subnetwork", EngineError):
            check_gathered(weights, self.config, adapter=adapter, step=step, scored=self.scored_steps)
        stage_steps = self._timetable().stage_steps
        select_subnetwork(weights, self.config, adapter=adapter, step=step, stage_steps=stage_steps)

    def check_ranks_agree(self) -> None:
        """Compare steps, masks and weights over all processes; see `peft_dps.check_ranks_agree`."""
        clock = [self.step, self.scored_steps, self.unscored_steps]
        agreement.check_agreement(self.adapter, clock, [weight for weight in self.weights if weight.exists()])

    def _forget_dead(self) -> None:
        if not all(weight.exists() for weight in self.weights):
            self.weights = [weight for weight in self.weights if weight.exists()]
            self._noise, self._by_layer = None, {}
            self._announce()


def in_backward() -> bool:
    """Tell whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1
