"""Step -> (cycle, stage): the timetable of a DPS training."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from peft_dps.errors import ConfigError, ScheduleError


class Stage(str, enum.Enum):
    """The two stages of a cycle, in their order."""

    ACCUMULATE = "accumulate"
    SUBNETWORK = "subnetwork"


@dataclass(frozen=True)
class Position:
    """Where in the timetable a step lies.

    Attributes:
        cycle: Number of the cycle, counted from 1.
        stage: Stage of the cycle.
        step_in_stage: Number of the step within its stage, counted from 1.
    """

    cycle: int
    stage: Stage
    step_in_stage: int


@dataclass(frozen=True)
class StageSchedule:
    """Alternates two stages of equal length: step t is in ACCUMULATE iff ((t - 1) // stage_steps) is even.

    The stages are Stage I and Stage II of Zhang et al., "Fine-Tuning Pre-Trained Language Models Effectively by
    Optimizing Subnetworks Adaptively" (NeurIPS 2022, arXiv:2211.01642), section 3.

    Attributes:
        stage_steps: Length of one stage, in applied optimizer steps.
    """

    stage_steps: int

    def __post_init__(self) -> None:
        if self.stage_steps < 1:
            raise ConfigError(f"`stage_steps` must be at least 1 step, got {self.stage_steps}.")

    @classmethod
    def resolve(cls, stage_steps: int | float, total_steps: int | None) -> StageSchedule:
        """Build the schedule from a stage length given in steps or as a fraction of all steps.

        Args:
            stage_steps: Steps if an int; a fraction of `total_steps` in (0, 1) if a float, which gives
                max(1, int(total_steps * stage_steps)) steps.
            total_steps: Number of optimizer steps of the whole training. Only a fraction needs it.

        Returns:
            The schedule, in steps.

        Raises:
            ConfigError: If the stage length is out of range, or if the first stage would fill the whole training, so
                that no subnetwork would ever be selected.
            ScheduleError: If a fraction meets an unknown total.
        """
        if isinstance(stage_steps, float):
            if not 0.0 < stage_steps < 1.0:
                raise ConfigError(f"`stage_steps` as a fraction of all steps must be in (0, 1), got {stage_steps}.")
            if total_steps is None:
                raise ScheduleError(
                    f"`stage_steps={stage_steps}` is a fraction of all training steps, and their number is unknown. "
                    "Either set `DPSConfig(total_steps=...)`, or give `stage_steps` as an int, in steps, or call "
                    "`model.set_dps_total_steps(...)` before the first step. (The HF Trainer does that by itself.)"
                )
            stage_steps = max(1, int(total_steps * stage_steps))
        if total_steps is not None and stage_steps >= total_steps:
            raise ConfigError(
                f"`stage_steps` is {stage_steps} of only {total_steps} training steps, so training ends before a "
                "subnetwork is selected. Use a smaller `stage_steps`, or train for more steps."
            )
        return cls(stage_steps)

    def at(self, step: int) -> Position:
        """Return the position of an optimizer step.

        Args:
            step: Number of the step, counted from 1.

        Raises:
            ConfigError: If the step is smaller than 1.
        """
        if step < 1:
            raise ConfigError(f"`step` is counted from 1, got {step}.")
        stages_done, steps_into_stage = divmod(step - 1, self.stage_steps)
        stage = Stage.ACCUMULATE if stages_done % 2 == 0 else Stage.SUBNETWORK
        return Position(cycle=stages_done // 2 + 1, stage=stage, step_in_stage=steps_into_stage + 1)
