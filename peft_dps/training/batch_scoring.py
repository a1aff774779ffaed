"""Evidence from batches before training, each of which counts as a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from peft_dps.errors import ConfigError
from peft_dps.tensors.processes import world
from peft_dps.training.controller import Controller


def awaits_scores(controller: Controller) -> bool:
    """Tell whether batches have to be scored before training, and none have been yet."""
    clock, recipe = controller.clock, controller.recipe
    begun = clock.entered is not None or clock.step or clock.scored_steps or controller.is_selected
    return not begun and recipe.evidence.looks and recipe.schedule.begins_masked


@contextmanager
def scoring_batches(controller: Controller) -> Iterator[Callable[[], None]]:
    """Score batches before training; where several processes train together, all of them have to.

    What the batches of all processes have brought is added up at the end. An error makes it forgotten.

    Args:
        controller: What drives the adapter's recipe.

    Yields:
        A function that gathers evidence from the gradients that the weights have now, as a step of its own.

    Raises:
        ConfigError: If training has begun, evidence is gathered in training, or batches have been scored.
    """
    _check_may_score(controller)
    rested = controller.at_rest
    controller.at_rest = controller.scores_batches = True  # noise has no step to belong to
    try:
        yield lambda: _gather(controller)
        if controller.adds_up_batches:
            _add_up(controller)
        controller.see_batches_scored()
    except BaseException:
        if controller.clock.entered is None:  # nothing has been selected yet
            _forget(controller)
        raise
    finally:
        controller.at_rest, controller.scores_batches = rested, False


def _check_may_score(controller: Controller) -> None:
    adapter, clock = controller.adapter, controller.clock
    if clock.step or not clock.coming().phase.masked:
        raise ConfigError(
            f"Adapter {adapter!r}: evidence is gathered before training with `schedule='once'` and `score_steps=0` "
            f"only, and before the first step; {clock.step} steps have been made."
        )
    if clock.entered is not None or clock.scored_steps:
        raise ConfigError(
            f"Adapter {adapter!r}: batches have been scored already. Give all of them in one call, or begin anew with "
            "another adapter."
        )


def _gather(controller: Controller) -> None:
    controller.clock.begin_batch()
    weights = [weight for weight in controller.existing if weight.has_gradient]
    if weights:
        controller.gather(weights, None, None)


def _add_up(controller: Controller) -> None:
    weights = [weight for weight in controller.existing if weight.ranks is None]  # FSDP2 has added up the others
    ranks = world(weights[0].weight.device) if weights and controller.recipe.evidence.looks else None
    if ranks is None:
        return
    clock = controller.clock
    counts = [clock.scored_steps, clock.unscored_steps, *(weight.observed for weight in weights)]
    scored, unscored, *observed = ranks.sum(torch.tensor(counts, device=ranks.device)).tolist()
    if len(weights) == len(controller.existing):
        clock.scored_steps, clock.unscored_steps = scored, unscored
    for weight, count in zip(weights, observed, strict=True):
        weight.observed = count
        if count:
            weight.gathered.add_up(weight, ranks)


def _forget(controller: Controller) -> None:
    controller.clock.scored_steps = 0
    for weight in controller.existing:
        weight.begin_gathering()
