"""Recipes: a method as one object per axis. DPS Dense, DPS Mix and their baselines are points of one space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.masking.frozen_policy import FROZEN, FrozenPolicy, exact
from peft_dps.masking.noise import NOISES, Noise
from peft_dps.masking.storage import STORAGES, Storage
from peft_dps.selection.budget import SCOPES, Budget, EntryBudget, Scope
from peft_dps.selection.evidence import EVIDENCE, Evidence, SquaredGradients
from peft_dps.selection.granularity import GRANULARITIES, Entry, Granularity
from peft_dps.selection.moment_evidence import SecondMoments  # noqa: F401  # registers it
from peft_dps.selection.schedule import SCHEDULES, Schedule, ScheduleSettings
from peft_dps.selection.scores import SCORES, ScoreFunction, evidence_of, squared_gradient


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


def make_recipe(
    *,
    density: float = 0.7,
    schedule: str = "cycle",
    stage_steps: int | float = 0.05,
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
        density: Fraction of entries that the subnetwork holds, in (0, 1].
        schedule: Name of the schedule.
        stage_steps: Length of a stage, in steps or as a fraction of all.
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
    budget, kind = EntryBudget(density), GRANULARITIES.find(granularity)
    scope = scope or ("model" if kind.spans_weights else "tensor")
    if kind.spans_weights and not SCOPES.find(scope).across:
        raise ConfigError(
            f"`granularity={granularity!r}` selects whole weights, so there is nothing to choose from within one, and "
            f"`scope` is {scope!r}. Use `scope='model'`."
        )
    made_from = evidence or evidence_of(score)
    # At density 1 every column takes part in each step.
    noise_kind = NOISES.find("none" if budget.takes_all else noise)
    return Recipe(
        schedule=SCHEDULES.find(schedule)(ScheduleSettings(stage_steps, score_steps)),
        budget=budget,
        evidence=EVIDENCE.find(made_from)(score_dtype),
        score=SCORES.find(score),
        granularity=kind(reduction),
        scope=SCOPES.find(scope)(),
        frozen=FROZEN.find(frozen),
        noise=noise_kind(density, seed, participation_decay),
        storage=STORAGES.find(storage)(),
        seed=seed,
        settings={**settings, "scope": scope, "evidence": made_from},
    )


def dps_dense(**settings: Any) -> Recipe:
    """DPS Dense (Zhang et al., NeurIPS 2022): stages in turns, entries scored by their squared gradients.

    Args:
        **settings: See `make_recipe`.
    """
    return make_recipe(**settings)


def dps_mix(**settings: Any) -> Recipe:
    """DPS Mix: DPS Dense with column noise, and scores relaxed by how often a column took part.

    Args:
        **settings: See `make_recipe`.
    """
    return make_recipe(noise="columns", **settings)


def random_mask(**settings: Any) -> Recipe:
    """DPS Dense that selects at random: what scores from gradients have to beat.

    Args:
        **settings: See `make_recipe`.
    """
    return make_recipe(score="random", **settings)
