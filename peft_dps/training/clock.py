"""The clock of one adapter: which step of which stage it is, and which steps were scored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from peft_dps.tuner.config import DPSConfig
from peft_dps.selection.schedule import Position, Stage, StageSchedule

logger = logging.getLogger(__name__)


class Clock:
    """Counts the steps of one adapter. One logical step may take several optimizers, each with weights of its own.

    Args:
        adapter: Name of the adapter.
        config: Its configuration.
    """

    def __init__(self, adapter: str, config: DPSConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.restart(config.total_steps)

    def restart(self, total_steps: int | None) -> None:
        """Count from 0 again.

        Args:
            total_steps: Number of optimizer steps of the training, if known.
        """
        self.total_steps = total_steps
        self.step = 0
        self.scored_steps = 0
        self.unscored_steps = 0
        self.loaded_after: int | None = None  # the step after which the adapter's weights were loaded
        self.position: Position | None = None
        self._schedule: StageSchedule | None = None
        self._entered: Stage | None = None
        self._in_round: set[str] = set()
        self._counted: set[bool] = set()  # whether this step was scored, by each of its optimizers

    @property
    def stage(self) -> Stage | None:
        """Stage of the latest step; None before the first."""
        return None if self.position is None else self.position.stage

    @property
    def stage_is_over(self) -> bool:
        """Whether the latest step was the last one of its stage."""
        schedule, position = self._schedule, self.position
        return schedule is not None and position is not None and position.step_in_stage == schedule.stage_steps

    @property
    def schedule(self) -> StageSchedule | None:
        """The timetable; None before the first step."""
        return self._schedule

    @property
    def progress(self) -> dict[str, Any]:
        """How far the training is, in plain values: all that an exact resume needs but for what the weights hold."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "stage_steps": None if self._schedule is None else self._schedule.stage_steps,
            "entered": None if self._entered is None else self._entered.value,
            "scored_steps": self.scored_steps,
            "unscored_steps": self.unscored_steps,
            "in_round": sorted(self._in_round),
        }

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on where another training was; what its weights held is given to them afterwards.

        Args:
            progress: What `progress` was there.
        """
        self.restart(progress["total_steps"])
        self.step = progress["step"]
        self.scored_steps, self.unscored_steps = progress["scored_steps"], progress["unscored_steps"]
        self._in_round = set(progress["in_round"])
        self._entered = None if progress["entered"] is None else Stage(progress["entered"])
        if progress["stage_steps"] is not None:
            self._schedule = StageSchedule(progress["stage_steps"])
            self.position = self._schedule.at(self.step) if self.step > 0 else None

    def _joins(self, names: Iterable[str]) -> bool:
        """Tell whether a call with the weights of these names belongs to the latest step, and begins no new one."""
        return bool(self._in_round) and self._in_round.isdisjoint(names)

    def _count_scored(self, scored: bool) -> None:
        """Count a step once, however many optimizers take part in it."""
        if scored in self._counted:
            return
        self._counted.add(scored)
        if scored:
            self.scored_steps += 1
            return
        self.unscored_steps += 1
        logger.warning(
            "Adapter %r: the gradients of step %d are not finite; the step is counted but not scored.",
            self.adapter,
            self.step,
        )

    def _timetable(self) -> StageSchedule:
        self._schedule = self._schedule or StageSchedule.resolve(self.config.stage_steps, self.total_steps)
        return self._schedule
