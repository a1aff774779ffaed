"""SIFT (Song et al., 2023, arXiv:2312.11875)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def sift(**fields: Any) -> DPSConfig:
    """SIFT (Song et al., 2023, arXiv:2312.11875): the 5% of each weight where the first gradient is largest.

    score = abs(G) of the first step, which trains nothing. 5% is for instruction tuning; on GLUE they train 0.8% of
    the attention's weights. It costs what `fish` does, without a pass before training.

    Their code takes the gradient of the first backward pass alone; here the absolute values of all passes of the first
    step are added up. Weight decay has no effect in their code; here it pulls to the pretrained weight.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "score": "absolute_gradient",
        "density": 0.05,
        "schedule": "once",
        "score_steps": 1,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
