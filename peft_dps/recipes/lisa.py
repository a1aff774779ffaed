"""LISA (Pan et al., 2024, arXiv:2403.17919)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def lisa(**fields: Any) -> DPSConfig:
    """LISA: `units` layers of the model at random, others every `stage_steps` (Pan et al., arXiv:2403.17919).

    Use it where the optimizer's state of all weights does not fit in memory: gradients and optimizer state exist for
    the selected layers alone, and for embeddings, head and norms, which are trained from beginning to end. The
    defaults, two layers for 20 steps, are those of the released code. A layer that was trained keeps a copy of its
    weights, so that in the end the adapter is as large as the layers that had their turn. Each backward pass goes
    through all layers; with `train_remaining=False` it ends at the lowest selected one.

    A layer that enters begins without optimizer state; one that is selected twice in a row keeps its own. The released
    code leaves all states to the optimizer, and trains norms and biases of a layer with it; here biases of the layers
    are frozen.

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
