"""Fields that do nothing beside the others: a value that was given to one is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.selection.schedule import SCHEDULES, ScheduleSettings


def refuse_idle_fields(config: Any) -> None:
    """Refuse a value other than the default of a field that has no effect, whose user expects one.

    Raises:
        ConfigError: If there is one.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    idle = {
        "density": config.units is not None
        and f"since `units={config.units!r}` says how much is selected; use one of the two",
        "score_steps": not _schedule_reads(config, "score_steps", defaults["score_steps"])
        and f"with `schedule={config.schedule!r}`, whose scoring takes `stage_steps`; leave it out, or use "
        "`schedule='once'` or 'every'",
        "participation_decay": config.variant == "dense"
        and config.noise in (None, "none")
        and "without the noise of DPS Mix; leave it out, or use `variant='mix'`",
        "reduction": config.granularity == "entry"
        and "with `granularity='entry'`, whose units have one score each; leave it out",
    }
    for name, why in idle.items():
        if why and getattr(config, name) != defaults[name]:
            raise ConfigError(f"`{name}={getattr(config, name)!r}` has no effect {why}.")


def _schedule_reads(config: Any, name: str, default: Any) -> bool:
    """Tell whether another value of a setting makes another schedule."""
    make, given = SCHEDULES.find(config.schedule), ScheduleSettings(config.stage_steps, config.score_steps)
    try:
        return bool(make(given) != make(dataclasses.replace(given, **{name: default})))
    except ConfigError:  # the default does not go with the other settings
        return True
