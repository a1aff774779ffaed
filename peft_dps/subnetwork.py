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
from peft_dps.selection import select, select_across
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

    def __new__(cls, *_args: object, **_kwargs: object) -> Subnetwork:  # noqa: D102
        # Copies and unpickled models come through here as well, so they are known to the bridge like any other.
        self = super().__new__(cls)
        cls.alive.add(self)
        return self

    def __init__(self, adapter: str, config: DPSConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.weights: list[TrackedWeight] = []
        self.restart(config.total_steps)

    def restart(self, total_steps: int | None) -> None:
        """Forget scores, masks and steps, and begin a new training.

        Args:
            total_steps: Number of optimizer steps of that training, if known.
        """
        self.total_steps = total_steps
        self.step = 0
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

    def track(self, name: str, layer: DPSLayer) -> None:
        """Add the adapter's weight of a layer.

        Args:
            name: Path of the layer in the base model.
            layer: The layer, whose copy of this adapter exists already.
        """
        self.weights.append(TrackedWeight(name, layer, self.adapter))

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
            if weight.accept_changes():
                logger.warning(
                    "Adapter %r: frozen entries of %r were changed outside of the optimizer; they are held at their "
                    "new values from now on.",
                    self.adapter,
                    weight.name,
                )
            weight.mask_gradient()

    def hold(self, weights: Iterable[TrackedWeight]) -> None:
        """Give frozen entries back the bits they had when the stage began, if the policy is `"exact"`."""
        for weight in weights:
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
            self._canary.check(self.adapter, layer, self.step)
        if not self.is_mix:
            return None
        # A recomputation in the backward pass (gradient checkpointing) has to see what the forward saw.
        if self._prepared_for != self.step and not in_backward():
            self._prepare_mix()
        if not self._by_layer:
            self._by_layer = {id(weight.layer): weight for weight in self.weights}
        return self._by_layer[id(layer)].effective(self.config.density)

    def _prepare_mix(self) -> None:
        """Get ready for the forwards of the next step: enter its stage, and draw its column noise."""
        self._enter_next_stage()
        if self._entered is Stage.ACCUMULATE:
            if self._noise is None:
                inputs = [weight.weight.shape[weight.layer.input_axis] for weight in self.weights]
                self._noise = ColumnNoise(self.config.seed, inputs, self.config.density)
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
            if position.stage is Stage.SUBNETWORK:
                self._check_observed()
                self._select(self._schedule.stage_steps)
            else:
                for weight in self.weights:
                    weight.release()
                self.scored_steps = 0
            self._entered = position.stage
        return position

    def _score(self, weights: Sequence[TrackedWeight], grad_scale: torch.Tensor | None) -> None:
        gradients = [weight.gradient for weight in weights]
        if grad_scale is not None:
            inverse = 1.0 / grad_scale.to(torch.float32)
            gradients = [gradient.to(torch.float32) * inverse.to(gradient.device) for gradient in gradients]
        norms = torch.stack([norm.to(gradients[0].device) for norm in torch._foreach_norm(gradients)])
        if not bool(norms.isfinite().all()):
            self.unscored_steps += 1
            logger.warning(
                "Adapter %r: the gradients of step %d are not finite; the step is counted but not scored.",
                self.adapter,
                self.step,
            )
            return
        self.scored_steps += 1
        accumulate_squares_([weight.running_total() for weight in weights], gradients)
        if self.is_mix:
            for weight in weights:
                weight.count_participation()

    def _check_observed(self) -> None:
        if find_score(self.config.score).uses_gradients and self.scored_steps == 0:
            raise ScoreError(
                f"Adapter {self.adapter!r}: none of the {self.step} steps so far had finite gradients to score, so no "
                "subnetwork can be selected. Look for the cause of the NaN or inf; the weights are as before this "
                "step."
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
                self._freeze(weight, select(self._scores(weight, index, stage_steps), density))
        else:
            scores = [self._scores(weight, index, stage_steps) for index, weight in enumerate(self.weights)]
            for weight, mask in zip(self.weights, select_across(scores, density), strict=True):
                self._freeze(weight, mask)

    def _freeze(self, weight: TrackedWeight, mask: torch.Tensor) -> None:
        weight.freeze(mask, exact=self.config.frozen == "exact", snapshot=self.is_mix)

    def _scores(self, weight: TrackedWeight, index: int, stage_steps: int) -> torch.Tensor:
        """Evaluate the score of one weight; its accumulated total is given away."""
        score = find_score(self.config.score)
        total = weight.running_total() if score.uses_gradients else None
        weight.total = None
        if total is not None and weight.participation is not None:
            row, decay = weight.over_columns(weight.participation), self.config.participation_decay
            decay = stage_steps >= DECAY_FROM_STEPS if decay is None else decay
            relax_by_participation_(total, row, stage_steps, decay=decay)
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
