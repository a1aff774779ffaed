"""DPS Mix (Zhang et al., NeurIPS 2022, arXiv:2211.01642)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def dps_mix(**fields: Any) -> DPSConfig:
    """DPS Mix: DPS Dense with column noise, and scores relaxed by how often a column took part.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**{"variant": "mix", **fields})
