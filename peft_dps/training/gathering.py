"""ACCUMULATE: the gradients of a step -> what weights gather for their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.optim import Optimizer

from peft_dps.tuner.config import DPSConfig
from peft_dps.errors import EngineError, ScoreError
from peft_dps.training.located import UNKNOWN
from peft_dps.selection.moments import second_moments
from peft_dps.selection.scores import accumulate_squares_, are_finite, find_score
from peft_dps.tensors.shards import distinct
from peft_dps.training.weight import TrackedWeight


def gather(
    weights: Sequence[TrackedWeight], config: DPSConfig, optimizer: Optimizer, grad_scale: torch.Tensor | None
) -> bool:
    """Let weights gather what their scores are made of.

    Args:
        weights: Tracked weights that have a gradient, at least one.
        config: Names the score.
        optimizer: The optimizer that is about to update them.
        grad_scale: Factor that a gradient scaler has left in the gradients, or None.

    Returns:
        Whether the step could be scored: False where a gradient is not finite, on this process or on another that
        holds a part of the weights.
    """
    if config.lean:
        moments = second_moments(optimizer, {weight.name: weight.parameter for weight in weights})
        for weight in weights:
            weight.count_moment(moments[weight.name])
    else:
        gradients = [weight.gradient for weight in weights]
        finite = are_finite(gradients)
        everywhere = [not ranks.any(not finite) for ranks in distinct(weight.ranks for weight in weights)]
        if not (finite and all(everywhere)):
            return False
        scale = 1.0 if grad_scale is None else float(grad_scale)
        accumulate_squares_([weight.running_total() for weight in weights], gradients, scale)
    if config.is_mix:
        for weight in weights:
            weight.count_participation()
    return True


def check_gathered(
    weights: Iterable[TrackedWeight], config: DPSConfig, *, adapter: str, step: int, scored: int
) -> None:
    """Check that a subnetwork can be selected.

    Args:
        weights: All weights of the adapter.
        config: Its configuration.
        adapter: Its name.
        step: Number of the latest step.
        scored: Steps of the stage that were scored.

    Raises:
        ScoreError: If no step was.
        EngineError: If something else than its optimizer changed a weight.
    """
    if find_score(config.score).uses_gradients and scored == 0:
        raise ScoreError(
            f"Adapter {adapter!r}: no step of the ACCUMULATE stage that ended with step {step} was scored, so no "
            "subnetwork can be selected. Look for the cause of NaN or inf in the gradients; the weights are as before "
            "this step."
        )
    for weight in weights:
        if find_score(config.score).uses_gradients and weight.observed > 0 and not weight.is_scored:
            raise ScoreError(
                f"Adapter {adapter!r}: no gradient of {weight.name!r} in the ACCUMULATE stage that ended with step "
                f"{step} was finite, so it has no scores. Look for the cause of NaN or inf in its gradients."
            )
        is_trained = weight.parameter.requires_grad  # else only who loads values changes it
        if is_trained and weight.observed == 0 and weight.version not in (UNKNOWN, weight.parameter._version):
            raise EngineError(
                f"The weight of {weight.name!r} was changed, but no optimizer step with its gradient was seen. Its "
                "optimizer works on a copy (CPU offloading, sharding) or is no torch.optim.Optimizer; use one that "
                "steps the model's own parameters."
            )
