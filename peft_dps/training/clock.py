"""The clock of one adapter: which step of which phase it is, and which steps were scored."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from peft_dps.errors import ConfigError, ScheduleError
from peft_dps.selection.phase import Phase, Position
from peft_dps.selection.schedule import Schedule
from peft_dps.tensors.saved_state import SavedState

logger = logging.getLogger(__name__)


class Clock:
    """Counts the steps of one adapter. One logical step may take several optimizers, each with weights of its own.

    Args:
        adapter: Name of the adapter.
        schedule: Its schedule.
        total_steps: Number of optimizer steps of the training, if known.

    Attributes:
        step: Steps so far.
        position: Where in the schedule the latest one lies; None before the first.
        entered: Number of the phase that has begun; it may be that of the coming step.
        scored_steps: Steps of the phase that were scored.
        unscored_steps: Steps of the training that were not, since their gradients were not finite.
        calls: Optimizer steps seen, also those that were skipped or joined another one.
    """

    def __init__(self, adapter: str, schedule: Schedule, total_steps: int | None) -> None:
        self.adapter = adapter
        self.schedule = schedule
        self.total_steps = total_steps
        self.step = 0
        self.position: Position | None = None
        self.entered: int | None = None
        self.scored_steps = 0
        self.unscored_steps = 0
        self.calls = 0
        self._resolved: Schedule | None = None
        self._in_round: set[str] = set()
        self._counted: set[bool] = set()  # whether this step was scored, by each of its optimizers

    def resolve(self) -> Schedule:
        """Find the lengths of the phases, once, and say what a user has to know of them.

        Raises:
            ScheduleError: If the number of steps is unknown and has to be known.
            ConfigError: If training would end before a mask is selected.
        """
        if self._resolved is None:
            self._resolved = self.schedule.resolve(self.total_steps)
            warning = self.schedule.warning(self.total_steps)
            if warning is not None:
                logger.warning("Adapter %r: %s", self.adapter, warning)
        return self._resolved

    @property
    def resolved(self) -> Schedule:
        """The schedule, with its lengths in steps."""
        return self.resolve()

    @property
    def is_resolved(self) -> bool:
        """Whether the lengths of phases are known already."""
        return self._resolved is not None

    def coming(self) -> Position:
        """Return the position of the coming step."""
        return self.resolved.at(self.step + 1)

    def go_on_with(self, schedule: Schedule) -> None:
        """Begin at once in the first phase of a schedule that has nothing to score before it."""
        self._resolved = schedule.resolve(self.total_steps)
        self.entered = self.coming().number

    @property
    def phase_is_over(self) -> bool:
        """Whether the latest step was the last one of its phase."""
        return self.position is not None and self.position.is_last

    @property
    def entered_phase(self) -> Phase | None:
        """The phase that has begun; None before any has."""
        if self.entered is None:
            return None
        coming = self.coming()
        at = coming if self.position is None or coming.number == self.entered else self.position
        return at.phase

    @property
    def most_steps(self) -> float:
        """How many steps may have been looked at: any number before training, if evidence is gathered then."""
        before_training = not self.is_resolved or not self.resolved.at(1).phase.gathers
        return math.inf if before_training else self.step

    def joins(self, names: Iterable[str]) -> bool:
        """Tell whether a call with the weights of these names belongs to the latest step, and begins no new one."""
        return bool(self._in_round) and self._in_round.isdisjoint(names)

    def join(self, names: set[str]) -> None:
        """Take note that the weights of these names belong to the latest step."""
        self._in_round |= names

    def begin_step(self, position: Position, names: set[str]) -> None:
        """Count a step, of which the weights of these names are the first."""
        self.position = position
        self.step += 1
        self._in_round = names
        self._counted = set()

    def begin_batch(self) -> None:
        """Take note that a batch is scored before training, which counts as a step that is scored."""
        self._counted = set()

    def count_scored(self, scored: bool) -> bool:
        """Count a step once, however many optimizers take part in it; tell whether it was counted now."""
        if scored in self._counted:
            return False
        self._counted.add(scored)
        self.scored_steps += scored
        self.unscored_steps += not scored
        return True

    def state(self, names: set[str]) -> dict[str, Any]:
        """Return how far the training is, in plain values."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "schedule": None if self._resolved is None else self._resolved.state(),
            "entered": self.entered,
            "scored_steps": self.scored_steps,
            "unscored_steps": self.unscored_steps,
            "in_round": sorted(self._in_round & names),
        }

    def read(self, saved: SavedState, names: set[str]) -> Clock:
        """Return the clock of a training that goes on where another was."""
        before = saved.number("total_steps", at_least=2, optional=True)
        clock = Clock(self.adapter, self.schedule, self.total_steps or before)
        clock.step = saved.number("step")
        clock.scored_steps, clock.unscored_steps = saved.number("scored_steps"), saved.number("unscored_steps")
        clock._in_round = set(saved.names("in_round"))
        clock.entered = saved.number("entered", optional=True)
        if saved.fact("schedule") is not None:
            clock._resolved = self._read_schedule(saved, saved.table("schedule"))
        saved.finish()
        clock._check(saved, names)
        if self.total_steps and before and before != self.total_steps:
            logger.warning(
                "Adapter %r: the training was to have %d steps when its state was saved, and now has %d. It goes on "
                "from step %d, with its scores and masks, and its phases stay as long as they were (%s).",
                self.adapter,
                before,
                self.total_steps,
                clock.step,
                saved.fact("schedule"),
            )
        return clock

    def _read_schedule(self, saved: SavedState, lengths: dict[str, Any]) -> Schedule:
        try:
            schedule = self.schedule.load(lengths).resolve(None)
        except (ConfigError, ScheduleError, TypeError) as error:
            raise saved.damaged(f"`schedule` is {lengths!r} ({error})") from error
        # Lengths that depend on the number of steps may be those of another one.
        expected = schedule if self.schedule.is_relative else self.schedule.resolve(None)
        if schedule not in (expected, self.schedule.going_on()) or schedule.state() != lengths:
            raise saved.damaged(f"`schedule` is {lengths!r}, and this training's is {expected.state()!r}")
        return schedule

    def _check(self, saved: SavedState, names: set[str]) -> None:
        """Find the position, and check that the rest of a saved clock goes with it."""
        step, known = self.step, self._resolved is not None
        if step and not known:
            raise saved.damaged(f"`schedule` is None at step {step}")
        self.position = self.resolved.at(step) if step else None
        around = [self.position, self.coming() if known else None]
        possible = {None if position is None else position.number for position in around}
        if self.entered not in (possible - {None} if step else possible):
            lengths = self.resolved.state() if known else None
            raise saved.damaged(f"`entered` is {self.entered!r} at step {step}, and `schedule` is {lengths!r}")
        if self.position is not None and self.position.phase.gathers and self.scored_steps > self.position.step:
            raise saved.damaged(
                f"`scored_steps` is {self.scored_steps} at step {step}, which is step {self.position.step} of a phase"
            )
        for name, count in (("scored_steps", self.scored_steps), ("unscored_steps", self.unscored_steps)):
            if count > self.most_steps:
                raise saved.damaged(f"`{name}` is {count} at step {step}")
        if not self._in_round <= (names if step else set()):
            raise saved.damaged(f"`in_round` is {sorted(self._in_round)}, which are no weights of this step")
