"""What a weight has gathered in ACCUMULATE -> its scores."""

from __future__ import annotations

import random

import torch

from peft_dps.config import DPSConfig
from peft_dps.errors import ConfigError
from peft_dps.scores import Evidence, find_score, relax_by_participation_
from peft_dps.tracked import TrackedWeight

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
        ConfigError: If a registered score returns another shape.
    """
    score = find_score(config.score)
    total = weight.running_total() if score.uses_gradients else None
    if total is not None and weight.participation is not None:
        columns, decay = weight.layer.columns, config.participation_decay
        decay = stage_steps >= DECAY_FROM_STEPS if decay is None else decay
        row = columns.spread(weight.participation)
        relax_by_participation_(columns.unfold(total), row, stage_steps, decay=decay)
        weight.participation = None  # relaxed once, also if the selection has to be repeated
    seed = random.Random(f"peft_dps/score/{config.seed}/{step}/{index}").getrandbits(63)
    evidence = Evidence(
        squared_gradients=total,
        weight=weight.weight.detach(),
        base_weight=weight.base_weight,
        generator=torch.Generator().manual_seed(seed),
    )
    scores = score.function(evidence)
    if scores.shape != weight.weight.shape:
        raise ConfigError(
            f"The score {config.score!r} returned shape {tuple(scores.shape)} for the weight of {weight.name!r}; it "
            f"must have the weight's shape {tuple(weight.weight.shape)}."
        )
    return scores
