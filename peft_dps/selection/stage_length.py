"""How many steps a stage has: those that are asked for, or a fraction of all, but never too few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_dps.errors import ConfigError, ScheduleError

SHORTEST = 10
"""The fewest steps of a stage whose length is a fraction: a mask from fewer batches says little of the data."""
FRACTION = 0.05
"""The fraction of all steps that a stage has unless a user says more; that of the paper (arXiv:2211.01642)."""


@dataclass(frozen=True)
class StageLength:
    """The length of a stage as `stage_steps` says it.

    Attributes:
        asked: Steps if an int, which are taken as they are; a fraction of all steps if a float; None for `FRACTION`,
            or for the fewest steps where the number of all is unknown.
        shortest: The fewest steps that a fraction stands for.
        left: The fewest that have to be left of the training after a stage whose length is a fraction.
        comes_again: Whether another stage follows, so that a length which nobody has asked for does little harm.
    """

    asked: int | float | None
    shortest: int = SHORTEST
    left: int = SHORTEST
    comes_again: bool = True

    def check(self, at_least: int = 1) -> None:
        """Check what is asked for.

        Raises:
            ConfigError: If it is no number of steps and no fraction.
        """
        steps: Any = self.asked
        if isinstance(steps, bool) or not (steps is None or isinstance(steps, (int, float))):
            raise ConfigError(f"`stage_steps` must be an int (steps) or a float (fraction), got {steps!r}.")
        if isinstance(steps, int) and steps < at_least:
            raise ConfigError(f"`stage_steps` as a number of steps must be at least {at_least}, got {steps}.")
        if isinstance(steps, float) and not 0.0 < steps < 1.0:
            raise ConfigError(
                f"`stage_steps` as a fraction of all steps must be in (0, 1), got {steps}. Use an int for steps."
            )

    def steps(self, total_steps: int | None) -> int:
        """Return the length in steps.

        Args:
            total_steps: Optimizer steps of the whole training; None where they are unknown.

        Raises:
            ScheduleError: If they are unknown and have to be known.
            ConfigError: If they are too few.
        """
        if isinstance(self.asked, int):
            return self.asked
        if total_steps is None:
            return self._steps_of_unknown()
        longest = total_steps - self.left
        if longest < self.shortest:
            raise ConfigError(
                f"`stage_steps={self.fraction}` is a fraction of only {total_steps} training steps: it stands for "
                f"{self.shortest} steps or more, and training needs {self.shortest + self.left} for that. Train for "
                "more steps (smaller batches, more epochs), give `stage_steps` as an int, or score before training "
                "(`schedule='once'`, `score_steps=0` and `model.dps_score(batches)`)."
            )
        return min(max(self._exact(total_steps), self.shortest), longest)

    def warning(self, total_steps: int | None) -> str | None:
        """Return why the length is not the one that is asked for, and the remedy; None if it is."""
        if isinstance(self.asked, int):
            return None
        steps = self.steps(total_steps)
        if total_steps is None:
            return (
                f"`stage_steps` is not given, and the number of training steps, of which it would be {FRACTION}, is "
                f"unknown: a stage has {steps} steps. Give `stage_steps` as an int, in steps, or set "
                "`DPSConfig(total_steps=...)`, or call `model.set_dps_total_steps(...)` before the first step."
            )
        exact = self._exact(total_steps)
        if steps == exact:
            return None
        bound = (
            "the fewest that a fraction stands for: a mask from fewer says little"
            if exact < steps
            else f"so that {total_steps - steps} are left after it"
        )
        return (
            f"`stage_steps={self.fraction}` of {total_steps} training steps is {exact}. A stage has {steps} steps, "
            f"{bound}. To have it otherwise, give `stage_steps` as an int, such as {max(exact, 1)}, or train for "
            "another number of steps."
        )

    @property
    def fraction(self) -> float:
        """The fraction of all steps, if it is one."""
        return FRACTION if self.asked is None else self.asked

    def _exact(self, total_steps: int) -> int:
        return int(total_steps * self.fraction)

    def _steps_of_unknown(self) -> int:
        if self.asked is None and self.comes_again:
            return self.shortest
        raise ScheduleError(
            f"`stage_steps={self.fraction}` is a fraction of all training steps, and their number is unknown. Either "
            "set `DPSConfig(total_steps=...)`, or give `stage_steps` as an int, in steps, or call "
            "`model.set_dps_total_steps(...)` before the first step. (The HF Trainer does that by itself.)"
        )
