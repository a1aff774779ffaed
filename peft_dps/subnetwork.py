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
from peft_dps.errors import ConfigError, EngineError, ScheduleError, ScoreError
from peft_dps.freezing import frozen_checksum, hold_frozen, keep_from_mask, restore_frozen_, zero_frozen_
from peft_dps.layer import DPSLayer
from peft_dps.schedule import Position, Stage, StageSchedule
from peft_dps.scores import SCORES, Evidence, accumulate_squares_, score_dtype
from peft_dps.selection import select, select_across
from peft_dps.tracked import TrackedWeight

logger = logging.getLogger(__name__)


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
        self.schedule: StageSchedule | None = None
        self.step = 0
        self.scored_steps = 0
        self.unscored_steps = 0
        self.position: Position | None = None
        self._in_round: set[str] = set()
        self._canary = Canary()
        for weight in self.weights:
            weight.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_canary": Canary()}

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

    def begin_call(self, weights: Sequence[TrackedWeight]) -> None:
        """Take note that an optimizer is about to update these weights.

        A logical step may take several optimizers, or one per parameter: a new step begins when a weight comes again.
        """
        names = {weight.name for weight in weights}
        if self._in_round and not names & self._in_round:
            self._in_round |= names
            return
        schedule = self.schedule or self._make_schedule()
        position = schedule.at(self.step + 1)
        if position.stage is not self.stage:
            self._enter(position.stage, schedule)
        self.schedule, self.position, self._in_round = schedule, position, names
        self.step += 1

    def take_gradients(self, weights: Sequence[TrackedWeight], grad_scale: torch.Tensor | None) -> None:
        """Score the gradients in ACCUMULATE; zero those of frozen entries in SUBNETWORK.

        Args:
            weights: Tracked weights that have a gradient.
            grad_scale: Factor that a gradient scaler has left in the gradients, or None.
        """
        if self.stage is Stage.SUBNETWORK:
            for weight in weights:
                if weight.keep is not None:
                    weight.keep = weight.keep.to(weight.weight.device)
                    zero_frozen_(weight.gradient, weight.keep)
            return
        for weight in weights:
            weight.observed += 1
        if SCORES[self.config.score].uses_gradients:
            self._score(weights, grad_scale)

    def hold(self, weights: Iterable[TrackedWeight]) -> None:
        """Give frozen entries back the bits they had when the stage began, if the policy is `"exact"`."""
        for weight in weights:
            if weight.keep is not None and weight.held is not None:
                weight.held = weight.held.to(weight.weight.device)
                restore_frozen_(weight.weight, weight.keep, weight.held)

    def on_forward(self, layer: DPSLayer) -> None:
        """Check in training forwards that whatever changes the weights shows its steps to the bridge."""
        self._canary.check(self.adapter, layer, self.step)

    def _make_schedule(self) -> StageSchedule:
        steps, total = self.config.stage_steps, self.total_steps
        if isinstance(steps, float) and total is None:
            raise ScheduleError(
                f"`stage_steps={steps}` is a fraction of all training steps, and their number is unknown. Either set "
                f"`DPSConfig(total_steps=...)`, or give `stage_steps` as an int, in steps, or call "
                f"`model.set_dps_total_steps(...)` before the first step. (The HF Trainer does that by itself.)"
            )
        return StageSchedule.resolve(steps, total)

    def _enter(self, stage: Stage, schedule: StageSchedule) -> None:
        if stage is Stage.SUBNETWORK:
            self._check_observed()
            self._select(schedule)
        else:
            for weight in self.weights:
                weight.keep = weight.held = weight.checksum = weight.total = None
                weight.observed, weight.version = 0, weight.weight._version
            self.scored_steps = 0

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
        for weight in weights:
            if weight.total is None:
                weight.total = torch.zeros_like(weight.weight, dtype=score_dtype(weight.weight), requires_grad=False)
            weight.total = weight.total.to(weight.weight.device)
        totals = [weight.total for weight in weights if weight.total is not None]
        accumulate_squares_(totals, gradients)

    def _check_observed(self) -> None:
        if SCORES[self.config.score].uses_gradients and self.scored_steps == 0:
            raise ScoreError(
                f"Adapter {self.adapter!r}: none of the {self.step} steps so far had finite gradients to score, so no "
                "subnetwork can be selected. Look for the cause of the NaN or inf; the weights are as before this "
                "step."
            )
        for weight in self.weights:
            if weight.observed == 0 and weight.weight._version != weight.version:
                raise EngineError(
                    f"The weight of {weight.name!r} was changed, but no optimizer step with its gradient was seen. "
                    "Its optimizer works on a copy (CPU offloading, sharding) or is no torch.optim.Optimizer; use "
                    "one that steps the model's own parameters."
                )

    @torch.no_grad()
    def _select(self, schedule: StageSchedule) -> None:
        if self.config.density == 1.0:
            for weight in self.weights:
                weight.total, weight.selected = None, weight.weight.numel()
            return
        if self.config.scope == "tensor":
            for index, weight in enumerate(self.weights):
                self._freeze(weight, select(self._scores(weight, index), self.config.density))
            return
        scores = [self._scores(weight, index) for index, weight in enumerate(self.weights)]
        for weight, mask in zip(self.weights, select_across(scores, self.config.density), strict=True):
            self._freeze(weight, mask)

    def _scores(self, weight: TrackedWeight, index: int) -> torch.Tensor:
        """Evaluate the score of one weight; its accumulated total is given away."""
        score = SCORES[self.config.score]
        total, weight.total = weight.total, None
        if total is None and score.uses_gradients:
            total = torch.zeros_like(weight.weight, dtype=score_dtype(weight.weight))
        evidence = Evidence(
            squared_gradients=total,
            weight=weight.weight.detach(),
            base_weight=weight.base_weight,
            generator=self._generator(index),
        )
        return score.function(evidence)

    def _generator(self, index: int) -> torch.Generator:
        seed = random.Random(f"peft_dps/{self.config.seed}/{self.step}/{index}").getrandbits(63)
        return torch.Generator().manual_seed(seed)

    def _freeze(self, weight: TrackedWeight, mask: torch.Tensor) -> None:
        if mask.shape != weight.weight.shape:
            raise ConfigError(
                f"The score {self.config.score!r} returned shape {tuple(mask.shape)} for the weight of "
                f"{weight.name!r}; it must have the weight's shape {tuple(weight.weight.shape)}."
            )
        weight.selected = int(torch.count_nonzero(mask))
        weight.keep = keep_from_mask(mask)
        if self.config.frozen == "exact":
            weight.held = hold_frozen(weight.weight, weight.keep)
        else:
            weight.checksum = frozen_checksum(weight.weight, weight.keep)
