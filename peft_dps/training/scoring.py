"""The gradients of a step -> evidence; evidence -> scores."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.optim import Optimizer

from peft_dps.errors import ConfigError, ScoreError
from peft_dps.selection.scores import check_scores
from peft_dps.training.recipe import Recipe
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)


def gather(
    weights: Sequence[TargetWeight], recipe: Recipe, optimizer: Optimizer | None, grad_scale: torch.Tensor | None
) -> bool:
    """Gather evidence from the gradients of a step."""
    for weight in weights:
        weight.observed += 1
    scored = recipe.evidence.gather(weights, optimizer, grad_scale)
    for weight in weights:
        weight.memory.drop()  # evidence that did not take it has no need of it
        if scored and recipe.evidence.looks:
            weight.count_participation()
    return scored


def warn_of_unscored(adapter: str, step: int) -> None:
    """Warn of a step whose gradients are not finite."""
    logger.warning(
        "Adapter %r: the gradients of step %d are not finite; the step is counted but not scored.", adapter, step
    )


def check_gathered(weights: Iterable[TargetWeight], recipe: Recipe, *, adapter: str, step: int, scored: int) -> None:
    """Check that there is evidence to select a subnetwork from."""
    if not recipe.evidence.looks:
        return
    weights = list(weights)
    if scored == 0 and step == 0 and not any(weight.observed for weight in weights):
        raise ScoreError(
            f"Adapter {adapter!r}: call `model.dps_score(batches)` before training, or set `score_steps` to the "
            "number of steps to score in. Nothing has been scored, so no subnetwork can be selected."
        )
    if scored == 0:
        raise ScoreError(
            f"Adapter {adapter!r}: no step of the ACCUMULATE stage that ended with step {step} was scored, so no "
            "subnetwork can be selected. Look for the cause of NaN or inf in the gradients; the weights are as before "
            "this step. In compact storage call `model.train()` too: in evaluation mode nothing is scored."
        )
    for weight in weights:
        if weight.observed > 0 and weight.gathered.is_empty and weight.mask is None:
            raise ScoreError(
                f"Adapter {adapter!r}: no gradient of {weight.name!r} in the ACCUMULATE stage that ended with step "
                f"{step} was finite, so it has no scores. Look for the cause of NaN or inf in its gradients."
            )


def check_dtypes(weights: Iterable[TargetWeight], recipe: Recipe) -> None:
    """Check before anything is scored that evidence which will be ranked together has one dtype."""
    if not recipe.scope.across or not recipe.granularity.per_entry or recipe.budget.takes_all:
        return
    named = {recipe.evidence.dtype_for(weight.weight): weight.name for weight in weights}
    if len(named) > 1:
        found = " and ".join(f"{dtype} for {name!r}" for dtype, name in named.items())
        raise ConfigError(
            f"`scope='model'` ranks all scores together, so they need one dtype, got {found}. Use `scope='tensor'`, "
            "or give all targets one dtype."
        )


def scores_of(
    weight: TargetWeight,
    recipe: Recipe,
    *,
    index: int,
    step: int,
    steps: int,
    selection: int = 1,
    place: int = 0,
    places: int = 1,
) -> torch.Tensor:
    """Evaluate the score of one weight; relaxes its evidence in place. The last three are told by `ScoreContext`."""
    seed = random.Random(f"peft_dps/score/{recipe.seed}/{step}/{index}").getrandbits(63)
    context = weight.score_context(torch.Generator().manual_seed(seed), steps)
    context = replace(context, selection=selection, place=place, places=places)
    scores = recipe.score(context)
    check_scores(scores, context.weight, score=recipe.score_name, name=weight.name)
    return scores
