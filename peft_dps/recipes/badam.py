"""BAdam (Luo et al., NeurIPS 2024, arXiv:2404.02827)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def badam(**fields: Any) -> DPSConfig:
    """BAdam: one layer of the model after the other (Luo et al., NeurIPS 2024, arXiv:2404.02827).

    Use it where not even the gradients of all weights fit in memory: gradients and optimizer state exist for one layer
    alone, and the backward pass ends at it. Layers take turns in ascending order, each for `stage_steps` steps, 100 as
    in the authors' runs on Llama. The optimizer, Adam or AdamW, begins anew with each. A layer that was trained keeps
    a copy of its weights, so that after one round the adapter is as large as all layers.

    Embeddings and the head are frozen; `modules_to_save` trains them. Norms and biases of the layers are frozen too,
    where the released code trains them with their layer; the authors' runs also shuffle the layers for each round.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise. A `density` takes the place of `units`.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "block",
        "units": None if "density" in fields else 1,
        "score": "in_turn",
        "schedule": "every",
        "stage_steps": 100,
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
