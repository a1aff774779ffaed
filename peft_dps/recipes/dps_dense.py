"""DPS Dense (Zhang et al., NeurIPS 2022, arXiv:2211.01642)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def dps_dense(**fields: Any) -> DPSConfig:
    """DPS Dense: stages in turns, entries scored by their squared gradients.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**fields)
