"""HFT, half fine-tuning (Hui et al., 2024, arXiv:2404.18466)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def hft(**fields: Any) -> DPSConfig:
    """HFT: a random half of the weights is trained, the other half keeps its values (Hui et al., arXiv:2404.18466).

    Use it in place of full fine-tuning where the model is not to forget what it knows. The frozen half shares the base
    model's memory: no gradient, no optimizer state.

    In each layer of the model two of the four matrices of attention are trained; of three feed-forward matrices two
    in a random half of the layers and one in the others. Embeddings, the head and norms are trained in full. For one
    training after another give each another `seed`.

    The paper trains half of the norms; here all are. With `train_remaining=False` they and the embeddings stay frozen,
    and the backward pass ends at the lowest trained weight. Biases of the layers are frozen.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "tensor",
        "scope": "category",
        "budget": "units",
        "density": 0.5,
        "score": "random",
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
        "train_remaining": True,
    }
    return DPSConfig(**{**paper, **fields})
