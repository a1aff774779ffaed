"""What weights have gathered in ACCUMULATE -> their scores -> their masks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft_dps.tuner.config import DPSConfig
from peft_dps.errors import ConfigError, EngineError, ScoreError
from peft_dps.selection.scores import Evidence, find_score, relax_by_participation_
from peft_dps.selection.topk import select, select_across, selected_count, sortable_key
from peft_dps.selection.sharded_topk import WEIGHTS_AT_ONCE, check_scores, select_sharded
from peft_dps.tensors.shards import Ranks, together
from peft_dps.training.weight import TrackedWeight

DECAY_FROM_STEPS = 50  # shorter stages do not count participation finely enough for the decay, in the released code


def scores_of(weight: TrackedWeight, config: DPSConfig, *, index: int, step: int, stage_steps: int) -> torch.Tensor:
    """Evaluate the score of one weight; relaxes what it has gathered in place.

    Args:
        weight: The weight, at the end of its ACCUMULATE stage.
        config: Names the score.
        index: Place of the weight among those of the adapter.
        step: Number of the latest step.
        stage_steps: Length of a stage, in steps.

    Returns:
        Scores of the weight's shape.

    Raises:
        ConfigError: If a registered score returns something else.
    """
    score = find_score(config.score)
    total = weight.running_total() if score.uses_gradients else None
    if total is not None and weight.participation is not None:
        columns, decay = weight.layer.columns, config.participation_decay
        decay = stage_steps >= DECAY_FROM_STEPS if decay is None else decay
        row, sharding = columns.spread(weight.participation), weight.sharding
        if sharding is None:
            relax_by_participation_(columns.unfold(total), row, stage_steps, decay=decay)
        else:  # the rows here may begin in the middle of a group
            out, *inner = sharding.shape
            unfolded = (out, *inner) if columns.groups == 1 else (columns.groups, out // columns.groups, *inner)
            own = sharding.part_of(row.expand(unfolded).reshape(sharding.shape))
            relax_by_participation_(total, own, stage_steps, decay=decay)
        weight.participation = None  # relaxed once, also if the selection has to be repeated
    seed = random.Random(f"peft_dps/score/{config.seed}/{step}/{index}").getrandbits(63)
    evidence = Evidence(
        squared_gradients=total,
        weight=weight.weight.detach(),
        load_base=lambda: weight.base_weight,
        generator=torch.Generator().manual_seed(seed),
        whole_shape=None if weight.sharding is None else weight.sharding.shape,
        first_row=0 if weight.sharding is None else weight.sharding.first,
    )
    scores = score.function(evidence)
    _check_scores(scores, weight, config.score)
    return scores


def _check_scores(scores: Any, weight: TrackedWeight, score: str) -> None:
    """Check what a score returned, which may be anything if a user has registered it."""
    wanted = (weight.weight.shape, weight.weight.device)
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        found = f"dtype {scores.dtype}" if isinstance(scores, torch.Tensor) else f"{type(scores).__name__}"
        raise ConfigError(
            f"The score {score!r} returned {found} for the weight of {weight.name!r}; it must be a tensor of floats."
        )
    if (scores.shape, scores.device) != wanted:
        raise ConfigError(
            f"The score {score!r} returned shape {tuple(scores.shape)} on {scores.device} for the weight of "
            f"{weight.name!r}; it must be {tuple(wanted[0])} on {wanted[1]}, as the weight."
        )


def ranked_together(weights: Iterable[TrackedWeight]) -> list[list[TrackedWeight]]:
    """Batch weights whose masks are chosen at once: one by one where they are whole, many where they are sharded.

    Args:
        weights: The weights.

    Returns:
        Batches, in the same order on all processes.
    """
    alike: dict[tuple[Ranks | None, torch.dtype], list[TrackedWeight]] = {}
    for weight in weights:
        alike.setdefault((weight.ranks, weight.score_dtype), []).append(weight)
    batches = []
    for (ranks, _), found in alike.items():
        at_once = 1 if ranks is None else WEIGHTS_AT_ONCE
        batches += [found[start : start + at_once] for start in range(0, len(found), at_once)]
    return batches


def check_dtypes(weights: Iterable[TrackedWeight], config: DPSConfig) -> None:
    """Check before anything is scored that scores which will be ranked together have one dtype.

    Args:
        weights: All weights of the adapter.
        config: Names score and scope. A registered score returns what dtype it likes.

    Raises:
        ConfigError: If they have several.
    """
    if config.scope != "model" or config.score != "squared_gradient" or config.density == 1.0:
        return
    named = {weight.score_dtype: weight.name for weight in weights}
    if len(named) > 1:
        found = " and ".join(f"{dtype} for {name!r}" for dtype, name in named.items())
        raise ConfigError(
            f"`scope='model'` ranks all scores together, so they need one dtype, got {found}. Use `scope='tensor'`, "
            "or give all targets one dtype."
        )


def masks_of(
    weights: Sequence[TrackedWeight],
    config: DPSConfig,
    *,
    among: Sequence[TrackedWeight],
    step: int,
    stage_steps: int,
) -> tuple[list[torch.Tensor], list[int]]:
    """Choose the masks of some weights; where they are sharded, all processes have to call it.

    Args:
        weights: The weights, all whole or all cut over the same processes; with `scope="model"` all of the adapter.
        config: Names score, density and scope.
        among: All weights of the adapter.
        step: Number of the latest step.
        stage_steps: Length of a stage, in steps.

    Returns:
        A bool mask per weight, and how many entries of each whole weight are selected.

    Raises:
        ConfigError: If a registered score returns another shape.
        ScoreError: If a score is NaN or negative.
        EngineError: If that happens on another process.
    """
    density, across = config.density, config.scope == "model"
    places = {id(weight): index for index, weight in enumerate(among)}
    ranks = weights[0].ranks
    with together([] if ranks is None else [ranks], "Selecting a subnetwork", EngineError):
        scores = [
            scores_of(weight, config, index=places[id(weight)], step=step, stage_steps=stage_steps)
            for weight in weights
        ]
        if ranks is not None or across:
            for weight, each in zip(weights, scores, strict=True):
                with _named(weight):
                    sortable_key(each)
        if ranks is not None:
            check_scores(scores)
    if ranks is not None:
        return select_sharded(scores, [weight.entries for weight in weights], density, ranks, together=across)
    if across:
        masks = select_across(scores, density)
        return masks, [int(mask.count_nonzero()) for mask in masks]
    masks = [_select(weight, each, density) for weight, each in zip(weights, scores, strict=True)]
    return masks, [selected_count(each.numel(), density) for each in scores]


def _select(weight: TrackedWeight, scores: torch.Tensor, density: float) -> torch.Tensor:
    with _named(weight):
        return select(scores, density)


@contextmanager
def _named(weight: TrackedWeight) -> Iterator[None]:
    """Add to an error of scores whose they are, and what to do."""
    try:
        yield
    except ScoreError as error:
        raise ScoreError(
            f"The weight of {weight.name!r}: {error} Look for NaN or inf in the gradients of this stage, or in what a "
            "score of your own returns."
        ) from error
