"""Magnitude: the largest pretrained weights, the baseline that needs no data."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def magnitude(**fields: Any) -> DPSConfig:
    """The 5% of entries of each weight where the pretrained weight is largest: score = abs(W0).

    A baseline that needs no data. It finds what matters to the pretrained model, and not to the task.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "score": "magnitude",
        "density": 0.05,
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
