"""Schedules: which phase of a training a step lies in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_dps.errors import ConfigError
from peft_dps.selection.phase import ACCUMULATE, FULL, REWOUND, SUBNETWORK, Phase, Position
from peft_dps.selection.stage_length import SHORTEST, StageLength
from peft_dps.tensors.registry import Registry

_BEFORE = "score before training (`score_steps=0` and `model.dps_score(batches)`)"


class Schedule:
    """Tells the phase of each step. A subclass says `at`, and is a frozen dataclass if it has settings of its own.

    Attributes:
        selects: Whether a subnetwork is selected at all.
        selects_again: Whether another subnetwork may be selected after the first.
        rewinds: Whether there are phases that rewind; these begin with a training forward.
        waits_for: The field that says how many steps come before the first selection.
    """

    selects: ClassVar[bool] = True
    selects_again: ClassVar[bool] = True
    rewinds: ClassVar[bool] = False
    waits_for: ClassVar[str] = "stage_steps"

    @property
    def is_relative(self) -> bool:
        """Whether `resolve` makes lengths of the number of all steps."""
        return False

    @property
    def gathers(self) -> bool:
        """Whether evidence can be gathered before a subnetwork is selected."""
        return True

    @property
    def begins_masked(self) -> bool:
        """Whether a subnetwork is selected before the first step."""
        return False

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step, counted from 1."""
        raise NotImplementedError

    def resolve(self, total_steps: int | None) -> Schedule:
        """Return the schedule of a training of so many steps.

        Args:
            total_steps: Optimizer steps of the whole training; None where they are unknown.

        Raises:
            ScheduleError: If they are unknown and have to be known.
            ConfigError: If training would end before a mask is selected.
        """
        return self

    def warning(self, total_steps: int | None) -> str | None:
        """Return what a user has to know of the phases of a training of so many steps, and the remedy, if anything."""
        return None

    def going_on(self) -> Schedule | None:
        """Return the schedule of a training that goes on with what is selected; None if others are selected anew."""
        return None

    def state(self) -> dict[str, Any]:
        """Return the settings, once resolved, in plain values."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> Schedule:
        """Return the schedule with settings that `state` returned."""
        own: Any = self
        return dataclasses.replace(own, **state) if state else self


@dataclass(frozen=True)
class ScheduleSettings:
    """What a configuration says about the length of phases.

    Attributes:
        stage_steps: Length of a stage: optimizer steps if an int, a fraction of all steps if a float; see
            `StageLength`.
        score_steps: Steps of scoring before a subnetwork is selected, where that is no stage.
    """

    stage_steps: int | float | None = None
    score_steps: int = 8


SCHEDULES: Registry[Any] = Registry("schedule")


@SCHEDULES.register("cycle")
def _cycle(settings: ScheduleSettings) -> Schedule:
    return Cycle(settings.stage_steps)


@SCHEDULES.register("once")
def _once(settings: ScheduleSettings) -> Schedule:
    return Once(settings.score_steps)


@SCHEDULES.register("every")
def _every(settings: ScheduleSettings) -> Schedule:
    return Every(settings.stage_steps, settings.score_steps)


@SCHEDULES.register("two-phase")
def _two_phase(settings: ScheduleSettings) -> Schedule:
    return TwoPhase(settings.stage_steps)


@SCHEDULES.register("full")
def _full(settings: ScheduleSettings) -> Schedule:
    return Full()


@dataclass(frozen=True)
class _Staged(Schedule):
    """Has stages of a length that may be a fraction of all steps.

    Attributes:
        stage_steps: Length of a stage; see `StageLength`.
    """

    stage_steps: int | float | None

    def __post_init__(self) -> None:
        self.length.check()

    @property
    def length(self) -> StageLength:
        """The length of a stage, and the bounds of what a fraction stands for."""
        return StageLength(self.stage_steps, comes_again=self.selects_again)

    @property
    def is_relative(self) -> bool:
        """Whether the length is no number of steps; see `Schedule.is_relative`."""
        return not isinstance(self.stage_steps, int)

    @property
    def steps(self) -> int:
        """The length in steps, of a schedule that is resolved."""
        return self.stage_steps if isinstance(self.stage_steps, int) else self.length.steps(None)

    def resolve(self, total_steps: int | None) -> Schedule:
        """Return the schedule with its stages in steps; see `Schedule.resolve`."""
        steps = self.length.steps(total_steps)
        _require_selection(self.waits_for, steps, total_steps)
        return dataclasses.replace(self, stage_steps=steps)

    def warning(self, total_steps: int | None) -> str | None:
        """Return why a stage has another length than its fraction; see `Schedule.warning`."""
        return self.length.warning(total_steps)


@dataclass(frozen=True)
class Cycle(_Staged):
    """Alternates two stages of equal length: step t is in ACCUMULATE iff ((t - 1) // stage_steps) is even.

    Attributes:
        stage_steps: Length of a stage; see `StageLength`.
    """

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        stages_done, steps_into_stage = divmod(_counted(step) - 1, self.steps)
        phase = ACCUMULATE if stages_done % 2 == 0 else SUBNETWORK
        return Position(stages_done, phase, steps_into_stage + 1, self.steps, stages_done // 2 + 1)


@dataclass(frozen=True)
class Every(_Staged):
    """Selects anew every so many steps, from evidence of the first few of them.

    Attributes:
        stage_steps: Steps from one selection to the next. A fraction stands for twice those of scoring or more.
        score_steps: Those at the beginning in which evidence is gathered; 0 for scores that need none.
    """

    waits_for = "score_steps"
    score_steps: int

    def __post_init__(self) -> None:
        _check_score_steps(self.score_steps)
        self.length.check(at_least=2 if self.score_steps else 1)
        if isinstance(self.stage_steps, int) and self.score_steps >= self.stage_steps:
            raise ConfigError(
                f"`score_steps` must be less than `stage_steps`, the steps from one selection to the next, got "
                f"{self.score_steps} of {self.stage_steps}."
            )

    @property
    def length(self) -> StageLength:
        """The steps from one selection to the next."""
        return StageLength(self.stage_steps, shortest=max(SHORTEST, 2 * self.score_steps), left=0)

    @property
    def gathers(self) -> bool:
        """Whether there are steps in which evidence is gathered."""
        return self.score_steps > 0

    def resolve(self, total_steps: int | None) -> Schedule:
        """Return the schedule in steps; see `Schedule.resolve`."""
        _require_selection(self.waits_for, self.score_steps, total_steps)
        return dataclasses.replace(self, stage_steps=self.length.steps(total_steps))

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        done, into = divmod(_counted(step) - 1, self.steps)
        if into < self.score_steps:
            return Position(2 * done, ACCUMULATE, into + 1, self.score_steps, done + 1)
        length = self.steps - self.score_steps
        return Position(2 * done + 1, SUBNETWORK, into - self.score_steps + 1, length, done + 1)


@dataclass(frozen=True)
class Once(Schedule):
    """Gathers evidence for some steps, selects, and keeps the mask until training ends.

    Attributes:
        score_steps: Steps of scoring; 0 where evidence is gathered from batches before training.
    """

    selects_again = False
    waits_for = "score_steps"
    score_steps: int

    def __post_init__(self) -> None:
        _check_score_steps(self.score_steps)

    @property
    def begins_masked(self) -> bool:
        """Whether evidence is gathered before training; see `Schedule.begins_masked`."""
        return self.score_steps == 0

    def resolve(self, total_steps: int | None) -> Once:
        """Check that something is left to train; see `Schedule.resolve`."""
        _require_selection(self.waits_for, self.score_steps, total_steps, f", or {_BEFORE}")
        return self

    def warning(self, total_steps: int | None) -> str | None:
        """Return that scoring takes most of the training, if so; see `Schedule.warning`."""
        if total_steps is None or total_steps >= 2 * self.score_steps:
            return None
        return (
            f"`score_steps={self.score_steps}` of {total_steps} training steps leaves "
            f"{total_steps - self.score_steps} to train what is selected. Use a smaller `score_steps`, train for more "
            f"steps, or {_BEFORE}."
        )

    def going_on(self) -> Once:
        """Return the schedule without scoring; see `Schedule.going_on`."""
        return Once(0)

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        return _selected_once(step, self.score_steps, SUBNETWORK)


@dataclass(frozen=True)
class TwoPhase(_Staged):
    """Trains everything, selects, rewinds to the pretrained weights, and trains the subnetwork until training ends.

    That is LT-SFT (Ansell et al., ACL 2022, arXiv:2110.07560).

    Attributes:
        stage_steps: Steps of the first phase; see `StageLength`.
    """

    selects_again = False
    rewinds = True

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        return _selected_once(step, self.steps, REWOUND)


@dataclass(frozen=True)
class Full(Schedule):
    """Trains everything from the first step to the last, for methods that select nothing."""

    selects = False
    selects_again = False

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        return Position(0, FULL, _counted(step), None)


def _selected_once(step: int, before: int, then: Phase) -> Position:
    """Return the position of a step where so many of scoring are followed by one phase without an end."""
    if _counted(step) <= before:
        return Position(0, ACCUMULATE, step, before)
    return Position(1, then, step - before, None)


def _check_score_steps(steps: Any) -> None:
    if type(steps) is not int or steps < 0:
        raise ConfigError(f"`score_steps` must be an integer of at least 0, got {steps!r}.")


def _require_selection(name: str, steps: int, total_steps: int | None, otherwise: str = "") -> None:
    if total_steps is not None and steps >= total_steps:
        raise ConfigError(
            f"`{name}` is {steps} of only {total_steps} training steps, so training ends before a subnetwork is "
            f"selected. Use a smaller `{name}`, or train for more steps{otherwise}."
        )


def _counted(step: int) -> int:
    if step < 1:
        raise ConfigError(f"`step` is counted from 1, got {step}.")
    return step
