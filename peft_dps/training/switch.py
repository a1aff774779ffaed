"""The switch to SUBNETWORK: every weight of an adapter gets its mask and is frozen but for what that selects."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_dps.tuner.config import DPSConfig
from peft_dps.errors import EngineError
from peft_dps.masking.mask import Mask
from peft_dps.training.ranking import masks_of, ranked_together
from peft_dps.training.weight import TrackedWeight


@torch.no_grad()
def select_subnetwork(
    weights: Sequence[TrackedWeight], config: DPSConfig, *, adapter: str, step: int, stage_steps: int
) -> None:
    """Select the subnetwork of an adapter; where weights are sharded, all processes have to call it.

    Args:
        weights: All weights of the adapter, at the end of their ACCUMULATE stage.
        config: Its configuration.
        adapter: Its name.
        step: Number of the latest step.
        stage_steps: Length of a stage, in steps.

    Raises:
        EngineError: If weights are to be ranked together that are cut over different processes.
    """
    if config.density == 1.0:
        for weight in weights:
            weight.total = weight.moment = None
            weight.selected = weight.entries
        return
    # Those that have a mask got it in an earlier attempt, which an exception ended; their values may be others now.
    _keep_frozen([weight for weight in weights if weight.mask is not None], config)
    open_weights = [weight for weight in weights if weight.mask is None]
    if config.scope == "model":
        _check_ranks(weights, adapter)
        batches = [open_weights] if open_weights else []
    else:
        batches = ranked_together(open_weights)
    for batch in batches:
        selections, selected = masks_of(batch, config, among=weights, step=step, stage_steps=stage_steps)
        masks = [Mask.of(selection) for selection in selections]  # what may fail comes before any scores are dropped
        for weight, mask, count in zip(batch, masks, selected, strict=True):
            weight.freeze(mask, count)
        _keep_frozen(batch, config)


def _check_ranks(weights: Sequence[TrackedWeight], adapter: str) -> None:
    if len({weight.ranks for weight in weights}) > 1:
        raise EngineError(
            f"Adapter {adapter!r}: `scope='model'` ranks all weights together, but they are not all cut over the same "
            "processes. Apply `fully_shard` to the whole model, on one mesh, or use `scope='tensor'`."
        )


def _keep_frozen(weights: Sequence[TrackedWeight], config: DPSConfig) -> None:
    for weight in weights:
        weight.keep_frozen(exact=config.frozen == "exact", snapshot=config.is_mix, lean=config.lean)
