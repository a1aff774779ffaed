"""LISA (Pan et al., 2024, arXiv:2403.17919)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def lisa(**fields: Any) -> DPSConfig:
    """LISA: `units` layers of the model at random, others every `stage_steps` (Pan et al., arXiv:2403.17919).

    Embeddings and the head are trained from beginning to end, with an optimizer state that stays. The defaults, two
    layers for 20 steps each, are those of the released code.

    Use it where the optimizer's state of all weights does not fit in memory. Gradients and optimizer state exist for
    the selected layers alone. A layer that was trained once keeps a copy of its weights beside the base model's, so
    that in the end the adapter is as large as the layers that had their turn. As embeddings are trained, each backward
    pass goes through all layers; with `train_remaining=False` it ends at the lowest selected one.

    The state of a layer that leaves is dropped, and one that enters begins with none, bias correction included; one
    that is selected twice in a row keeps its own. The released code leaves all states to the optimizer. Norms inside
    of the layers are trained all the time, as embeddings are, and biases of the layers not at all; in the released
    code both go with their layer.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise. A `density` takes the place of `units`.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "block",
        "units": None if "density" in fields else 2,
        "score": "random",
        "schedule": "every",
        "stage_steps": 20,
        "score_steps": 0,
        "train_bias": False,
        "train_remaining": True,
    }
    return DPSConfig(**{**paper, **fields})
