"""Methods that select once, without a look at gradients."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def random_mask(**fields: Any) -> DPSConfig:
    """Entries selected once, at random: what scores have to beat at the same density.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    fixed: dict[str, Any] = {"score": "random", "schedule": "once", "score_steps": 0}
    return DPSConfig(**{**fixed, **fields})
