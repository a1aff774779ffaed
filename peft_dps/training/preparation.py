"""What the training forwards of an adapter are prepared for: the coming step, and the noise that is drawn for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from peft_dps.errors import EngineError
from peft_dps.masking.noise import Noise
from peft_dps.selection.phase import Position
from peft_dps.training.clock import Clock
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)


class Preparation:
    """What training forwards are prepared for. The first one after a step prepares all of the next.

    Args:
        adapter: Name of the adapter.
        noise: What its forwards compute with in place of weights.
        clock: How far its training is.

    Attributes:
        position: Position of the step that they are prepared for; None before the first.
    """

    def __init__(self, adapter: str, noise: Noise, clock: Clock) -> None:
        self._adapter = adapter
        self._noise = noise
        self._clock = clock
        self.position: Position | None = None
        self._after: int | None = None  # the step after which they were
        self._warned = False  # of steps without a training forward

    @property
    def is_current(self) -> bool:
        """Whether there was a training forward since the latest step."""
        return self._after == self._clock.step

    def draws(self, position: Position) -> bool:
        """Tell whether noise is drawn for a step."""
        return not (position.phase.masked and self._noise.amplifies)

    def prepare(self, position: Position, weights: Sequence[TargetWeight]) -> None:
        """Draw the noise of the coming step, which lies at this position."""
        if self._noise.substitutes and self.draws(position):
            units = [self._noise.units(weight.layout) for weight in weights]
            counts = [0 if each is None else each.count for each in units]
            drawn: dict[torch.device, tuple[Any, ...]] = {}
            for index, weight in enumerate(weights):
                device = weight.parameter.device
                if device not in drawn:
                    drawn[device] = self._noise.draw(self._clock.step + 1, counts, device)
                weight.noise.drawn = drawn[device][index]
        self.position, self._after = position, self._clock.step

    def finish(self, position: Position, weights: Iterable[TargetWeight]) -> None:
        """Leave the noise to a step that begins, or drop it if it was drawn for another: there was no forward."""
        if self.is_current:
            return
        for weight in weights:
            weight.noise.drawn = None
        if self._noise.substitutes and self.draws(position) and not self._warned:
            self._warned = True
            logger.warning(
                "Adapter %r: this is a step without any forward in training mode, so there is no noise in it. Call "
                "`model.train()`; dropout can be switched off by `peft_dps.disable_dropout(model)`.",
                self._adapter,
            )

    def check_joins(self, optimizer: Optimizer, rewound_after: int | None) -> None:
        """Refuse a second optimizer of a step after a forward with the noise, or the weights, of the next one."""
        step = self._clock.step
        if (self._noise.substitutes and self.is_current) or rewound_after == step:
            raise EngineError(
                f"Adapter {self._adapter!r}: {type(optimizer).__name__} is another optimizer of step {step}, and "
                "there was a training forward since the first one, which computes with the noise, or the rewound "
                "weights, of the next step. Step all optimizers after the same forward and backward, or use a "
                "method without (`variant='dense'`)."
            )
