"""The choice of a learning rate on the validation split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from peft_dps.compare.runs.run import Candidate, Run


def choose(tried: Sequence[Run]) -> list[Candidate]:
    """Choose the learning rate with the best mean score on the validation split; of equals that with the least loss.

    Args:
        tried: Runs of phase "tune", failed ones included. A rate with a failed run is chosen only if all have one.

    Returns:
        All candidates, one of them chosen.
    """
    candidates, losses = [], {}
    for rate in sorted({run.plan.learning_rate for run in tried}):
        runs = [run for run in tried if run.plan.learning_rate == rate]
        score = sum(run.validation_score for run in runs) / len(runs)
        losses[rate] = sum(run.evaluations[-1].loss for run in runs if run.evaluations)
        candidates.append(Candidate(rate, [run.plan.seed for run in runs], score))

    def rank(candidate: Candidate) -> tuple[float, float]:
        loss = losses[candidate.learning_rate]
        score = -math.inf if math.isnan(candidate.score) else candidate.score
        return score, -math.inf if math.isnan(loss) else -loss

    best = max(candidates, key=rank)
    return [replace(candidate, chosen=candidate is best) for candidate in candidates]


def beyond(candidates: Sequence[Candidate]) -> float | None:
    """Return the learning rate to try next: as far beyond the chosen one as the others are apart.

    Args:
        candidates: At least two, one of them chosen.

    Returns:
        The rate; None if the chosen one lies between others, or all trials failed.
    """
    rates = sorted(candidate.learning_rate for candidate in candidates)
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    if math.isnan(chosen.score) or chosen.learning_rate not in (rates[0], rates[-1]):
        return None
    # In 1, 3, 10, 30, ... every second step is the same.
    factor = rates[1] / rates[0] if chosen.learning_rate == rates[-1] else rates[-2] / rates[-1]
    if len(rates) > 2:
        factor = rates[-2] / rates[-3] if chosen.learning_rate == rates[-1] else rates[1] / rates[2]
    return float(f"{chosen.learning_rate * factor:.2g}")
