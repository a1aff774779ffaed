"""Checks of the fields of `DPSConfig` that no part of a recipe makes; fields that do nothing beside the others."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.selection.granularity import GRANULARITIES
from peft_dps.selection.schedule import SCHEDULES, ScheduleSettings


def check_targets(config: Any) -> None:
    """Check the fields that say what is targeted.

    Raises:
        ConfigError: If one has a value that cannot work.
    """
    parameters = config.target_parameters
    if parameters is not None and not _are_names(parameters, expression=False):
        raise ConfigError(f"`target_parameters` must be a list of names, got {parameters!r}.")
    if not (config.target_modules or parameters) or not _are_names(config.target_modules):
        raise ConfigError(f"`target_modules` must name modules or be 'all-linear', got {config.target_modules!r}.")
    if config.exclude_modules is not None and not _are_names(config.exclude_modules):
        raise ConfigError(f"`exclude_modules` must name modules, got {config.exclude_modules!r}.")
    if config.modules_to_save is not None and not _are_names(config.modules_to_save, expression=False):
        raise ConfigError(f"`modules_to_save` must be a list of names, got {config.modules_to_save!r}.")
    layers = config.layers_to_transform
    if layers is not None and not all(
        _is_int(layer) and layer >= 0 for layer in (layers if isinstance(layers, list) else [layers])
    ):
        raise ConfigError(f"`layers_to_transform` must be layer numbers of at least 0, got {layers!r}.")
    is_expression = isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear"
    if is_expression and config.layers_to_transform is not None:
        raise ConfigError(
            "`layers_to_transform` works with a list of names or 'all-linear' in `target_modules`, got the "
            f"regular expression {config.target_modules!r}. Put the layer numbers into the expression."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            f"`layers_pattern={config.layers_pattern!r}` needs `layers_to_transform`, the indices to count in it."
        )


def check_plain(config: Any) -> None:
    """Check fields of plain values that no part of a recipe checks.

    Raises:
        ConfigError: If one has a value that cannot work.
    """
    for name in ("train_bias", "train_remaining", "offload_base", "lean", "init_weights"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"`{name}` must be True or False, got {getattr(config, name)!r}.")
    if not _is_int(config.seed) or config.seed < 0:
        raise ConfigError(f"`seed` must be an integer of at least 0, got {config.seed!r}.")
    if config.participation_decay is not None and not isinstance(config.participation_decay, bool):
        raise ConfigError(f"`participation_decay` must be True, False or None, got {config.participation_decay!r}.")
    if config.total_steps is not None and (not _is_int(config.total_steps) or config.total_steps < 2):
        raise ConfigError(f"`total_steps` must be an integer of at least 2, got {config.total_steps!r}.")


def refuse_idle_fields(config: Any) -> None:
    """Refuse a value other than the default of a field that has no effect, whose user expects one.

    Raises:
        ConfigError: If there is one.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    is_noisy = config.variant != "dense" or config.noise not in (None, "none")
    idle = {
        "density": config.units is not None
        and f"since `units={config.units!r}` says how much is selected; use one of the two",
        "score_steps": not _schedule_reads(config, "score_steps", defaults["score_steps"])
        and f"with `schedule={config.schedule!r}`, whose scoring takes `stage_steps`; leave it out, or use "
        "`schedule='once'` or 'every'",
        "participation_decay": not is_noisy and "without the noise of DPS Mix; leave it out, or use `variant='mix'`",
        "reduction": GRANULARITIES.find(config.granularity).per_entry
        and f"with `granularity={config.granularity!r}`, whose units have one score each; leave it out",
    }
    if config.units is not None and is_noisy:
        raise ConfigError(
            f"`units={config.units!r}` leaves no `density`, which noise draws columns with. Give a `density` in place "
            "of it, or use `variant='dense'` without `noise`."
        )
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


def _are_names(value: Any, *, expression: bool = True) -> bool:
    return (expression and isinstance(value, str)) or (
        isinstance(value, (list, set)) and all(isinstance(name, str) and name for name in value)
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
