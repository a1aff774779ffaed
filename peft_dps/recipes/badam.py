"""BAdam (Luo et al., NeurIPS 2024, arXiv:2404.02827)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def badam(**fields: Any) -> DPSConfig:
    """BAdam: one layer of the model after the other (Luo et al., NeurIPS 2024, arXiv:2404.02827).

    Layers take turns in ascending order. Each is trained for `stage_steps` steps of the optimizer, 100 by default as
    in the authors' runs on Llama, and the optimizer begins anew with it: m = v = 0, and bias correction from the first
    step. After the last layer comes the first again. Use it with Adam or AdamW.

    Use it where not even the gradients of all weights fit in memory. Gradients and optimizer state exist for one layer
    alone, and the backward pass ends at it. A layer that was trained once keeps a copy of its weights beside the base
    model's, so that after one round the adapter is as large as all layers.

    As in the released code, embeddings and the head are frozen; `modules_to_save` trains them all the time. Norms and
    biases inside of the layers are frozen too, where the released code trains them with their layer. It also knows
    other orders: the authors' runs shuffle the layers anew for each round.

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
