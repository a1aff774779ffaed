"""A recipe: a method as one object per axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.masking.frozen_policy import FROZEN, FrozenPolicy, exact
from peft_dps.masking.noise import NOISES, Noise
from peft_dps.masking.storage import STORAGES, Storage
from peft_dps.selection.budget import BUDGETS, Budget
from peft_dps.selection.evidence import EVIDENCE, Evidence, SquaredGradients
from peft_dps.selection.granularity import GRANULARITIES, Entry, Granularity
from peft_dps.selection.moment_evidence import SecondMoments  # noqa: F401  # registers it
from peft_dps.selection.schedule import SCHEDULES, Schedule, ScheduleSettings
from peft_dps.selection.scope import SCOPES, Scope
from peft_dps.selection.scores import SCORES, ScoreFunction, evidence_of, is_per_unit, squared_gradient


@dataclass(frozen=True)
class Recipe:
    """A method: which part of the weights is trained, and when it is selected, from what.

    Attributes:
        schedule: Which phases follow each other.
        evidence: What is gathered in them for the scores.
        score: What makes scores of it.
        granularity: What is selected as a whole.
        scope: Among which units the best are chosen.
        budget: How many are.
        frozen: What becomes of the entries that are left out.
        noise: What training forwards compute with in place of the weight.
        storage: Which parameters hold what is trained.
        seed: Seed of the method's own random numbers.
        settings: The plain values that it was made from, which tell two trainings apart.
    """

    schedule: Schedule
    budget: Budget
    evidence: Evidence = field(default_factory=SquaredGradients)
    score: ScoreFunction = squared_gradient
    granularity: Granularity = field(default_factory=Entry)
    scope: Scope = field(default_factory=Scope)
    frozen: FrozenPolicy = exact
    noise: Noise = field(default_factory=Noise)
    storage: Storage = field(default_factory=Storage)
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def score_name(self) -> str:
        """What errors call the score."""
        return str(self.settings.get("score", getattr(self.score, "__name__", self.score)))

    @property
    def reads_base(self) -> bool:
        """Whether forwards compute with the values of the pretrained weights, instead of calling their layers."""
        return not (self.storage.compact and self.granularity.adds_to_output)


def make_recipe(
    *,
    density: float = 0.7,
    units: int | None = None,
    budget: str = "entries",
    max_density: float | None = None,
    schedule: str = "cycle",
    stage_steps: int | float | None = None,
    score_steps: int = 8,
    score: str = "squared_gradient",
    evidence: str | None = None,
    score_dtype: str = "float32",
    granularity: str = "entry",
    reduction: str = "mean",
    scope: str | None = None,
    frozen: str = "exact",
    noise: str = "none",
    participation_decay: bool | None = None,
    storage: str = "copy",
    seed: int = 0,
) -> Recipe:
    """Make a recipe from the names of its axes. The defaults are those of DPS Dense.

    Args:
        density: Fraction of what the budget counts that the subnetwork holds, in (0, 1].
        units: Number of units in place of a density: rows, columns or tiles of each weight, or weights or blocks of
            the model.
        budget: Name of what the density is counted in.
        max_density: Fraction of units that compact storage may hold values of, over all selections.
        schedule: Name of the schedule.
        stage_steps: Length of a stage, in steps or as a fraction of all; None for a twentieth; see `StageLength`.
        score_steps: Steps of scoring before a subnetwork is selected once.
        score: Name of the score.
        evidence: Name of the evidence; None for the one that the score is made from.
        score_dtype: What evidence is added up in.
        granularity: Name of the granularity.
        reduction: How the scores of a unit's entries make that of the unit.
        scope: Name of the scope; None for "tensor", or "model" where a unit is a weight or more.
        frozen: Name of the frozen policy.
        noise: Name of the noise.
        participation_decay: Of column noise, see `ColumnNoise`.
        storage: Name of the storage.
        seed: Seed of the method's own random numbers.

    Raises:
        ConfigError: If a name is unknown, a value is out of range, or two do not go together.
    """
    settings = dict(locals())
    kind = GRANULARITIES.find(granularity)
    settings["scope"] = scope = scope or ("model" if kind.spans_weights else "tensor")
    settings["evidence"] = evidence = evidence or evidence_of(score)
    counted = BUDGETS.find(budget)(density, units, max_density)
    _check_choice(settings, kind, SCOPES.find(scope), counted)
    _check_evidence(settings)
    phases = SCHEDULES.find(schedule)(ScheduleSettings(stage_steps, score_steps))
    _check_schedule(phases, settings)
    _check_storage(settings)
    # At density 1 every column takes part in each step.
    noise_kind = NOISES.find("none" if counted.takes_all else noise)
    return Recipe(
        schedule=phases,
        budget=counted,
        evidence=EVIDENCE.find(evidence)(score_dtype),
        score=SCORES.find(score),
        granularity=kind(reduction),
        scope=SCOPES.find(scope)(),
        frozen=FROZEN.find(frozen),
        noise=noise_kind(density, seed, participation_decay),
        storage=STORAGES.find(storage)(),
        seed=seed,
        settings=settings,
    )


def _check_choice(settings: dict[str, Any], kind: type[Granularity], scope: type[Scope], budget: Budget) -> None:
    """Check that units can be chosen among those that are ranked together, and counted."""
    granularity, units, scope_name = settings["granularity"], settings["units"], settings["scope"]
    if kind.spans_weights and not scope.across:
        raise ConfigError(
            f"`granularity={granularity!r}` selects whole weights, so there is nothing to choose from within one, and "
            f"`scope` is {scope_name!r}. Use `scope='model'`."
        )
    if kind.spans_layers and scope.divides_layers:
        raise ConfigError(
            f"`granularity={granularity!r}` selects all targets of a layer of the model at once, and "
            f"`scope={scope_name!r}` ranks them apart. Use `granularity='tensor'`, or `scope='model'`."
        )
    if units is not None and not kind.spans_weights and (kind.per_entry or scope.across):
        named, given = ("scope", scope_name) if scope.across else ("granularity", granularity)
        raise ConfigError(
            f"`units={units!r}` is a number of rows or columns of each weight, or of weights or blocks of the model, "
            f"and `{named}` is {given!r}. Use `granularity='column'`, `'row'` or `'submatrix'` with `scope='tensor'`, "
            "`granularity='tensor'` or `'block'`, or a `density`."
        )
    if budget.whole_weights and not kind.spans_weights:
        raise ConfigError(
            f"`budget={settings['budget']!r}` counts whole weights, and `granularity={granularity!r}` selects parts "
            "of them. Use `granularity='tensor'` or `'block'`, or `budget='entries'`."
        )
    if budget.in_flops and not scope.spans_model:
        raise ConfigError(
            f"`budget={settings['budget']!r}` counts the backward pass through the whole model, and "
            f"`scope={scope_name!r}` chooses within parts of it. Use `scope='model'`."
        )


def _check_evidence(settings: dict[str, Any]) -> None:
    """Check that something is gathered for a score that is made of it."""
    evidence, score = settings["evidence"], settings["score"]
    if EVIDENCE.find(evidence_of(score)).looks and not EVIDENCE.find(evidence).looks:
        raise ConfigError(
            f"`evidence={evidence!r}` gathers nothing, and `score={score!r}` is made of {evidence_of(score)!r}. "
            "Leave `evidence` out, or use a score that needs none, such as `score='random'`."
        )


def _check_schedule(schedule: Schedule, settings: dict[str, Any]) -> None:
    """Check that there is what a schedule selects from, and what it trains."""
    name, evidence = settings["schedule"], settings["evidence"]
    if not schedule.gathers and EVIDENCE.find(evidence).looks:
        raise ConfigError(
            f"`schedule={name!r}` with `score_steps={settings['score_steps']!r}` selects without a step in which "
            f"evidence is gathered, and `evidence` is {evidence!r}, which looks at gradients. Use a larger "
            "`score_steps`, or a score that needs none, such as `score='random'`."
        )
    if STORAGES.find(settings["storage"]).compact and (schedule.rewinds or not schedule.selects):
        raise ConfigError(
            f"`storage='compact'` does not go with `schedule={name!r}`, which trains whole weights: it holds selected "
            "units alone. Use `storage='copy'`."
        )


def _check_storage(settings: dict[str, Any]) -> None:
    """Check that the other axes go with the storage."""
    storage, evidence = settings["storage"], settings["evidence"]
    if not STORAGES.find(storage).compact:
        if settings["max_density"] is not None:
            raise ConfigError(
                f"`max_density={settings['max_density']!r}` bounds what `storage='compact'` holds, got {storage!r}."
            )
        return
    impossible = {
        "noise": settings["noise"] != "none" and "which computes with the whole weight; use `storage='copy'`",
        "score_dtype": settings["score_dtype"] != "float32" and "since it adds up units in fp64; leave it out",
        "frozen": settings["frozen"] != "exact" and "and what is frozen has no entries there; leave it out",
        "evidence": EVIDENCE.find(evidence).looks
        and EVIDENCE.find(evidence).power is None
        and "which cannot be added up in a backward pass; use 'squared_gradient' or 'absolute_gradient'",
        "score": EVIDENCE.find(evidence).looks
        and not is_per_unit(settings["score"])
        and "which may look at single entries; register it with `per_unit=True` if it does not",
    }
    for name, why in impossible.items():
        if why:
            raise ConfigError(f"`storage='compact'` does not go with `{name}={settings[name]!r}`, {why}.")
