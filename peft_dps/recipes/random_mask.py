"""Random mask: the baseline that scores have to beat."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def random_mask(**fields: Any) -> DPSConfig:
    """5% of the entries of each weight, selected once, at random: what scores have to beat at the same density.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "score": "random",
        "density": 0.05,
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
