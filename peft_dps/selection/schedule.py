"""Schedules: which phase of a training a step lies in."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_dps.errors import ConfigError, ScheduleError
from peft_dps.tensors.registry import Registry


class Stage(str, enum.Enum):
    """What the status calls a phase.

    The first two are Stage I and Stage II of DPS (Zhang et al., NeurIPS 2022, arXiv:2211.01642, section 3); in `FULL`
    everything is trained, and nothing is to be selected.
    """

    ACCUMULATE = "accumulate"
    SUBNETWORK = "subnetwork"
    FULL = "full"


@dataclass(frozen=True)
class Phase:
    """What happens in each of a stretch of steps.

    Attributes:
        stage: What the status calls it.
        gathers: Whether evidence is gathered from the gradients.
        masked: Whether a mask holds, which is selected when the phase begins.
        rewinds: Whether the weights become the pretrained ones again when the phase begins, after its selection.
    """

    stage: Stage
    gathers: bool
    masked: bool
    rewinds: bool = False


ACCUMULATE = Phase(Stage.ACCUMULATE, gathers=True, masked=False)
SUBNETWORK = Phase(Stage.SUBNETWORK, gathers=False, masked=True)
REWOUND = Phase(Stage.SUBNETWORK, gathers=False, masked=True, rewinds=True)
FULL = Phase(Stage.FULL, gathers=False, masked=False)


@dataclass(frozen=True)
class Position:
    """Where in a schedule a step lies.

    Attributes:
        number: Number of the phase, counted from 0. With another number another phase begins.
        phase: The phase.
        step: Number of the step in the phase, counted from 1.
        length: Steps of the phase; None where it lasts until training ends.
        cycle: Number of the cycle, counted from 1.
    """

    number: int
    phase: Phase
    step: int
    length: int | None
    cycle: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the step is the last one of its phase."""
        return self.step == self.length


class Schedule:
    """Tells the phase of each step. A subclass says `at`, and is a frozen dataclass if it has settings of its own.

    Attributes:
        selects: Whether a subnetwork is selected at all.
        selects_again: Whether another subnetwork may be selected after the first.
        rewinds: Whether there are phases that rewind; these begin with a training forward.
    """

    selects: ClassVar[bool] = True
    selects_again: ClassVar[bool] = True
    rewinds: ClassVar[bool] = False

    @property
    def gathers(self) -> bool:
        """Whether evidence can be gathered before a subnetwork is selected."""
        return True

    @property
    def begins_masked(self) -> bool:
        """Whether a subnetwork is selected before the first step."""
        return False

    @property
    def gathers(self) -> bool:
        """Whether evidence can be gathered before a subnetwork is selected."""
        return True

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
        stage_steps: Length of a stage: optimizer steps if an int, a fraction of all steps if a float.
        score_steps: Steps of scoring before a subnetwork is selected, where that is no stage.
    """

    stage_steps: int | float = 0.05
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
class Cycle(Schedule):
    """Alternates two stages of equal length: step t is in ACCUMULATE iff ((t - 1) // stage_steps) is even.

    Attributes:
        stage_steps: Length of a stage: optimizer steps if an int; a fraction of all steps in (0, 1) if a float, which
            stands for max(1, int(total_steps * stage_steps)) steps.
    """

    stage_steps: int | float

    def __post_init__(self) -> None:
        _require_number("stage_steps", self.stage_steps, 1)

    def resolve(self, total_steps: int | None) -> Cycle:
        """Return the schedule with its stages in steps; see `Schedule.resolve`."""
        steps = _in_steps(self.stage_steps, total_steps)
        _require_selection("stage_steps", steps, total_steps)
        return Cycle(steps)

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        length = int(self.stage_steps)
        stages_done, steps_into_stage = divmod(_counted(step) - 1, length)
        phase = ACCUMULATE if stages_done % 2 == 0 else SUBNETWORK
        return Position(stages_done, phase, steps_into_stage + 1, length, stages_done // 2 + 1)


@dataclass(frozen=True)
class Every(Schedule):
    """Selects anew every so many steps, from evidence of the first few of them.

    Attributes:
        stage_steps: Steps from one selection to the next; a float as in `Cycle`.
        score_steps: Those at the beginning in which evidence is gathered; 0 for scores that need none.
    """

    stage_steps: int | float
    score_steps: int

    def __post_init__(self) -> None:
        if type(self.score_steps) is not int or self.score_steps < 0:
            raise ConfigError(f"`score_steps` must be an integer of at least 0, got {self.score_steps!r}.")
        _require_number("stage_steps", self.stage_steps, 2 if self.score_steps else 1)
        if isinstance(self.stage_steps, int) and self.score_steps >= self.stage_steps:
            raise ConfigError(
                f"`score_steps` must be less than `stage_steps`, the steps from one selection to the next, got "
                f"{self.score_steps} of {self.stage_steps}."
            )

    @property
    def gathers(self) -> bool:
        """Whether there are steps in which evidence is gathered."""
        return self.score_steps > 0

    def resolve(self, total_steps: int | None) -> Every:
        """Return the schedule in steps; see `Schedule.resolve`."""
        _require_selection("score_steps", self.score_steps, total_steps)
        steps = _in_steps(self.stage_steps, total_steps)
        if steps <= self.score_steps:
            raise ConfigError(
                f"`stage_steps={self.stage_steps}` of {total_steps} training steps is {steps}, and scoring takes "
                f"`score_steps={self.score_steps}` of each, so that none is left to train what was selected. Give "
                "`stage_steps` as a larger number of steps (an int), or use a smaller `score_steps`."
            )
        return Every(steps, self.score_steps)

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        done, into = divmod(_counted(step) - 1, int(self.stage_steps))
        if into < self.score_steps:
            return Position(2 * done, ACCUMULATE, into + 1, self.score_steps, done + 1)
        length = int(self.stage_steps) - self.score_steps
        return Position(2 * done + 1, SUBNETWORK, into - self.score_steps + 1, length, done + 1)


@dataclass(frozen=True)
class Once(Schedule):
    """Gathers evidence for some steps, selects, and keeps the mask until training ends.

    Attributes:
        score_steps: Steps of scoring; 0 where evidence is gathered from batches before training.
    """

    selects_again = False
    score_steps: int

    def __post_init__(self) -> None:
        if type(self.score_steps) is not int or self.score_steps < 0:
            raise ConfigError(f"`score_steps` must be an integer of at least 0, got {self.score_steps!r}.")

    @property
    def begins_masked(self) -> bool:
        """Whether evidence is gathered before training; see `Schedule.begins_masked`."""
        return self.score_steps == 0

    def resolve(self, total_steps: int | None) -> Once:
        """Check that something is left to train; see `Schedule.resolve`."""
        _require_selection("score_steps", self.score_steps, total_steps)
        return self

    def going_on(self) -> Once:
        """Return the schedule without scoring; see `Schedule.going_on`."""
        return Once(0)

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        if _counted(step) <= self.score_steps:
            return Position(0, ACCUMULATE, step, self.score_steps)
        return Position(1, SUBNETWORK, step - self.score_steps, None)


@dataclass(frozen=True)
class TwoPhase(Schedule):
    """Trains everything, selects, rewinds to the pretrained weights, and trains the subnetwork until training ends.

    That is LT-SFT (Ansell et al., ACL 2022, arXiv:2110.07560).

    Attributes:
        stage_steps: Steps of the first phase; a float as in `Cycle`.
    """

    selects_again = False
    rewinds = True
    stage_steps: int | float

    def __post_init__(self) -> None:
        _require_number("stage_steps", self.stage_steps, 1)

    def resolve(self, total_steps: int | None) -> TwoPhase:
        """Return the schedule in steps; see `Schedule.resolve`."""
        steps = _in_steps(self.stage_steps, total_steps)
        _require_selection("stage_steps", steps, total_steps)
        return TwoPhase(steps)

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        length = int(self.stage_steps)
        if _counted(step) <= length:
            return Position(0, ACCUMULATE, step, length)
        return Position(1, REWOUND, step - length, None)


@dataclass(frozen=True)
class Full(Schedule):
    """Trains everything from the first step to the last, for methods that select nothing."""

    selects = False
    selects_again = False

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step; see `Schedule.at`."""
        return Position(0, FULL, _counted(step), None)


def _require_number(name: str, steps: Any, at_least: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, (int, float)):
        raise ConfigError(f"`{name}` must be an int (steps) or a float (fraction), got {steps!r}.")
    if isinstance(steps, int) and steps < at_least:
        raise ConfigError(f"`{name}` as a number of steps must be at least {at_least}, got {steps}.")
    if isinstance(steps, float) and not 0.0 < steps < 1.0:
        raise ConfigError(f"`{name}` as a fraction of all steps must be in (0, 1), got {steps}. Use an int for steps.")


def _in_steps(steps: int | float, total_steps: int | None) -> int:
    if isinstance(steps, int):
        return steps
    if total_steps is None:
        raise ScheduleError(
            f"`stage_steps={steps}` is a fraction of all training steps, and their number is unknown. Either "
            "set `DPSConfig(total_steps=...)`, or give `stage_steps` as an int, in steps, or call "
            "`model.set_dps_total_steps(...)` before the first step. (The HF Trainer does that by itself.)"
        )
    return max(1, int(total_steps * steps))


def _require_selection(name: str, steps: int, total_steps: int | None) -> None:
    if total_steps is not None and steps >= total_steps:
        raise ConfigError(
            f"`{name}` is {steps} of only {total_steps} training steps, so training ends before a subnetwork is "
            f"selected. Use a smaller `{name}`, or train for more steps."
        )


def _counted(step: int) -> int:
    if step < 1:
        raise ConfigError(f"`step` is counted from 1, got {step}.")
    return step
