"""The weights of one adapter, the stage they are in, and what that stage knows of them: scores, or masks."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from peft_dps.canary import Canary
from peft_dps.config import DPSConfig
from peft_dps.effective import EffectiveWeight
from peft_dps.errors import ConfigError, EngineError, ScoreError
from peft_dps.layer import DPSLayer
from peft_dps.noise import ColumnNoise
from peft_dps.schedule import Position, Stage, StageSchedule
from peft_dps.scores import Evidence, accumulate_squares_, find_score, relax_by_participation_
from peft_dps.selection import select, select_across, selected_count
from peft_dps.tracked import UNKNOWN, TrackedWeight

logger = logging.getLogger(__name__)
DECAY_FROM_STEPS = 50  # shorter stages do not count participation finely enough for the decay, in the released code


class Subnetwork:
    """Drives the stages of one adapter: scores in ACCUMULATE, selection at the switch, masks in SUBNETWORK.

    It counts steps only when told to by the bridge, and touches weights and gradients only then.

    Args:
        adapter: Name of the adapter.
        config: Its configuration.
    """

    alive: ClassVar[weakref.WeakSet[Subnetwork]] = weakref.WeakSet()
    generation: ClassVar[int] = 0  # goes on whenever a weight is tracked anew or forgotten, anywhere

    def __init__(self, adapter: str, config: DPSConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.weights: list[TrackedWeight] = []
        self.restart(config.total_steps)
        self._announce()

    def restart(self, total_steps: int | None) -> None:
        """Forget scores, masks and steps, and begin a new training.

        Args:
            total_steps: Number of optimizer steps of that training, if known.
        """
        self.total_steps = total_steps
        self.step = 0
        self.calls = 0
        self.scored_steps = 0
        self.unscored_steps = 0
        self.position: Position | None = None
        self._schedule: StageSchedule | None = None
        self._entered: Stage | None = None
        self._in_round: set[str] = set()
        self._prepared_for: int | None = None
        self._noise: ColumnNoise | None = None
        self._by_layer: dict[int, TrackedWeight] = {}
        self._canary = Canary()
        for weight in self.weights:
            weight.release()
            weight.selected = weight.columns = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_canary": Canary(), "_by_layer": {}}

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
        self.weights.append(TrackedWeight(name, layer, self.adapter))
        self._announce()

    @property
    def stage(self) -> Stage | None:
        """Stage of the latest step; None before the first."""
        return None if self.position is None else self.position.stage

    @property
    def entries(self) -> int:
        """Number of entries of all tracked weights."""
        return sum(weight.weight.numel() for weight in self.weights)

    @property
    def selected_fraction(self) -> float | None:
        """Fraction of all entries selected at the latest selection; None before the first."""
        counts = [weight.selected for weight in self.weights if weight.selected is not None]
        return sum(counts) / self.entries if counts else None

    @property
    def schedule(self) -> StageSchedule | None:
        """The timetable; None before the first step."""
        return self._schedule

    @property
    def is_mix(self) -> bool:
        """Whether training forwards use effective weights."""
        return self.config.variant == "mix" and self.config.density < 1.0

    def begin_call(self, weights: Sequence[TrackedWeight]) -> None:
        """Take note that an optimizer is about to make a step.

        A logical step may take several optimizers, or one per parameter: a new step begins when a weight comes again.

        Args:
            weights: Tracked weights that belong to the optimizer, with a gradient or without.
        """
        names = {weight.name for weight in weights}
        if self._in_round and not names & self._in_round:
            self._in_round |= names
            return
        self.position = self._enter_next_stage()
        if self._prepared_for != self.step:  # no training forward of this step drew noise for it
            for weight in self.weights:
                weight.columns = None
        self.step += 1
        self._in_round = names

    def take_gradients(self, weights: Sequence[TrackedWeight], grad_scale: torch.Tensor | None) -> None:
        """Score the gradients in ACCUMULATE; zero those of frozen entries in SUBNETWORK.

        Args:
            weights: Tracked weights that have a gradient.
            grad_scale: Factor that a gradient scaler has left in the gradients, or None.
        """
        if self._entered is Stage.ACCUMULATE:
            for weight in weights:
                weight.observed += 1
            if find_score(self.config.score).uses_gradients:
                self._score(weights, grad_scale)
            return
        for weight in weights:
            weight.mask_gradient()

    def accept_changes(self, weights: Iterable[TrackedWeight]) -> None:
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
        if not self.is_mix:
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
        """Get ready for the forwards of the next step: enter its stage, and draw its column noise."""
        self._enter_next_stage()
        if self._entered is Stage.ACCUMULATE:
            if self._noise is None:
                counts = [weight.layer.columns.count for weight in self.weights]
                self._noise = ColumnNoise(self.config.seed, counts, self.config.density)
            rows: dict[torch.device, tuple[torch.Tensor, ...]] = {}
            for index, weight in enumerate(self.weights):
                device = weight.weight.device
                if device not in rows:
                    rows[device] = self._noise.draw(self.step + 1, device)
                weight.columns = rows[device][index]
        self._prepared_for = self.step

    def _enter_next_stage(self) -> Position:
        """Make sure that the stage of the next step has begun, and return the step's position."""
        self._schedule = self._schedule or StageSchedule.resolve(self.config.stage_steps, self.total_steps)
        position = self._schedule.at(self.step + 1)
        if position.stage is not self._entered:
            self._forget_dead()
            if position.stage is Stage.SUBNETWORK:
                self._check_observed()
                self._select(self._schedule.stage_steps)
            else:
                for weight in self.weights:
                    weight.release()
                self.scored_steps = 0
            self._entered = position.stage
        return position

    def _forget_dead(self) -> None:
        if not all(weight.exists() for weight in self.weights):
            self.weights = [weight for weight in self.weights if weight.exists()]
            self._noise, self._by_layer = None, {}
            self._announce()

    def _score(self, weights: Sequence[TrackedWeight], grad_scale: torch.Tensor | None) -> None:
        gradients = [weight.gradient for weight in weights]
        wide = torch.float64 if any(gradient.dtype is torch.float64 for gradient in gradients) else torch.float32
        norms = torch._foreach_norm(gradients, 2, dtype=wide)
        if not bool(torch.stack([norm.to(gradients[0].device) for norm in norms]).isfinite().all()):
            self.unscored_steps += 1
            logger.warning(
                "Adapter %r: the gradients of step %d are not finite; the step is counted but not scored.",
                self.adapter,
                self.step,
            )
            return
        self.scored_steps += 1
        scale = 1.0 if grad_scale is None else float(grad_scale)
        accumulate_squares_([weight.running_total() for weight in weights], gradients, scale)
        if self.is_mix:
            for weight in weights:
                weight.count_participation()

    def _check_observed(self) -> None:
        if find_score(self.config.score).uses_gradients and self.scored_steps == 0:
            raise ScoreError(
                f"Adapter {self.adapter!r}: no step of the ACCUMULATE stage that ended with step {self.step} was "
                "scored, so no subnetwork can be selected. Look for the cause of NaN or inf in the gradients; the "
                "weights are as before this step."
            )
        for weight in self.weights:
            if weight.observed == 0 and weight.version not in (UNKNOWN, weight.weight._version):
                raise EngineError(
                    f"The weight of {weight.name!r} was changed, but no optimizer step with its gradient was seen. "
                    "Its optimizer works on a copy (CPU offloading, sharding) or is no torch.optim.Optimizer; use "
                    "one that steps the model's own parameters."
                )

    @torch.no_grad()
    def _select(self, stage_steps: int) -> None:
        density = self.config.density
        if density == 1.0:
            for weight in self.weights:
                weight.total, weight.selected = None, weight.weight.numel()
        elif self.config.scope == "tensor":
            for index, weight in enumerate(self.weights):
                if weight.keep is None:  # else an exception ended an earlier attempt, and this one goes on there
                    mask = select(self._scores(weight, index, stage_steps), density)
                    self._freeze(weight, mask, selected_count(mask.numel(), density))
        else:
            self._select_across(density, stage_steps)

    def _select_across(self, density: float, stage_steps: int) -> None:
        masks = select_across(
            [self._scores(weight, index, stage_steps) for index, weight in enumerate(self.weights)], density
        )
        for weight in self.weights:
            weight.total = None
        try:
            for weight, mask in zip(self.weights, masks, strict=True):
                self._freeze(weight, mask, int(mask.count_nonzero()))
        except Exception:
            for weight in self.weights:  # a half-frozen model must not train on
                weight.release()
            self.scored_steps = 0
            raise

    def _freeze(self, weight: TrackedWeight, mask: torch.Tensor, selected: int) -> None:
        weight.freeze(mask, selected, exact=self.config.frozen == "exact", snapshot=self.is_mix)

    def _scores(self, weight: TrackedWeight, index: int, stage_steps: int) -> torch.Tensor:
        """Evaluate the score of one weight."""
        score = find_score(self.config.score)
        total = weight.running_total() if score.uses_gradients else None
        if total is not None and weight.participation is not None:
            columns, decay = weight.layer.columns, self.config.participation_decay
            decay = stage_steps >= DECAY_FROM_STEPS if decay is None else decay
            row = columns.spread(weight.participation)
            relax_by_participation_(columns.unfold(total), row, stage_steps, decay=decay)
            weight.participation = None  # relaxed once, also if the selection has to be repeated
        evidence = Evidence(
            squared_gradients=total,
            weight=weight.weight.detach(),
            base_weight=weight.base_weight,
            generator=self._generator(index),
        )
        scores = score.function(evidence)
        if scores.shape != weight.weight.shape:
            raise ConfigError(
                f"The score {self.config.score!r} returned shape {tuple(scores.shape)} for the weight of "
                f"{weight.name!r}; it must have the weight's shape {tuple(weight.weight.shape)}."
            )
        return scores

    def _generator(self, index: int) -> torch.Generator:
        seed = random.Random(f"peft_dps/score/{self.config.seed}/{self.step}/{index}").getrandbits(63)
        return torch.Generator().manual_seed(seed)


def in_backward() -> bool:
    """Tell whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1
