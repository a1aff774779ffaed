"""The method that a configuration names: the one place where fields become a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.masking.frozen_policy import FROZEN
from peft_dps.masking.noise import NOISES
from peft_dps.masking.storage import STORAGES
from peft_dps.selection.budget import BUDGETS
from peft_dps.selection.evidence import EVIDENCE
from peft_dps.selection.granularity import GRANULARITIES
from peft_dps.selection.schedule import SCHEDULES
from peft_dps.selection.scope import SCOPES
from peft_dps.selection.scores import SCORES, evidence_of
from peft_dps.tensors.registry import Registry
from peft_dps.training.recipe import Recipe, make_recipe

_NOISE_OF = {"dense": "none", "mix": "columns"}  # by variant
_NAMED: dict[str, Registry[Any]] = {  # fields that take names which users may register
    "schedule": SCHEDULES,
    "budget": BUDGETS,
    "granularity": GRANULARITIES,
    "scope": SCOPES,
    "frozen": FROZEN,
    "score": SCORES,
    "evidence": EVIDENCE,
    "storage": STORAGES,
    "noise": NOISES,
}
_PLAIN = (
    "density",
    "units",
    "max_density",
    "stage_steps",
    "score_steps",
    "reduction",
    "score_dtype",
    "participation_decay",
    "seed",
)


def settings_of(config: Any) -> dict[str, Any]:
    """Return what makes two trainings the same method. Only the length of the training may change."""
    return {name: getattr(config, name) for name in ("variant", *_NAMED, *_PLAIN, "lean")}


def recipe_of(config: Any) -> Recipe:
    """Return the method that a `DPSConfig` names: one object per axis.

    Raises:
        ConfigError: If a field that says what the method is has a value that cannot work.
    """
    variant = config.variant
    if not isinstance(variant, str) or variant not in _NOISE_OF:
        raise ConfigError(f"`variant` must be one of {', '.join(map(repr, _NOISE_OF))}, got {variant!r}.")
    names = {name: getattr(config, name) for name in _NAMED}
    if config.noise is None:
        names["noise"] = _NOISE_OF[variant]
    if config.inference_mode:  # a trained adapter loads without the names that its training alone had registered
        needed = ("storage",) if names["storage"] == "copy" else ("storage", "granularity")
        names = {name: value for name, value in names.items() if name in needed or value in (None, *_NAMED[name])}
    if STORAGES.find(names["storage"]).compact:
        _check_base_is_needed(config)
    if config.lean:
        names |= _less_memory(config, names)
    plain = {name: getattr(config, name) for name in _PLAIN}
    recipe = make_recipe(**names, **plain)
    if recipe.budget.in_flops:
        _check_backward_ends(config)
    return replace(recipe, settings=settings_of(config))


def _check_backward_ends(config: Any) -> None:
    """Refuse what a number of FLOPs of the backward pass says nothing of, or is not true with."""
    for name, why in (
        ("train_bias", "and biases of every layer keep the backward pass from ending at the lowest selected weight"),
        ("train_remaining", "and what lies below the targets keeps the backward pass from ending at one of them"),
        ("target_parameters", "of which nothing tells how many FLOPs they take"),
    ):
        if getattr(config, name):
            raise ConfigError(
                f"`budget={config.budget!r}` does not go with `{name}={getattr(config, name)!r}`, {why}. Leave it out "
                f"(`train_bias=False`), or use `budget='entries'`."
            )


def _check_base_is_needed(config: Any) -> None:
    """Refuse what compact storage, whose forwards compute with the pretrained weights, has no use for."""
    for name, given in (
        ("variant", config.variant != "dense"),
        ("lean", config.lean),
        ("offload_base", config.offload_base),
    ):
        if given:
            raise ConfigError(
                f"`storage='compact'` does not go with `{name}={getattr(config, name)!r}`: its forwards compute with "
                f"the pretrained weights, and there are no others. Leave `{name}` out, or use `storage='copy'`."
            )


def _less_memory(config: Any, names: dict[str, Any]) -> dict[str, str]:
    """Return the choices that `lean=True` stands for."""
    for name, given in (("score_dtype", config.score_dtype != "float32"), ("evidence", config.evidence is not None)):
        if given:
            raise ConfigError(
                f"`{name}={getattr(config, name)!r}` has nothing to do with `lean=True`, which takes scores from the "
                "optimizer's second moment. Use one of the two."
            )
    chosen = {}
    if evidence_of(names.get("score", "squared_gradient")) == "squared_gradient":
        chosen["evidence"] = "second_moment"
    if names.get("frozen") == "exact":
        chosen["frozen"] = "exact_in_step"
    return chosen
