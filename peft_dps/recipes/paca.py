"""PaCA (Woo et al., ICLR 2025, arXiv:2503.01905)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def paca(**fields: Any) -> DPSConfig:
    """PaCA (Woo et al., ICLR 2025, arXiv:2503.01905): 16 columns of each weight, drawn at random.

    As many parameters as a LoRA of rank 8 of a square weight, and the backward pass keeps 16 columns of each input.
    It needs no data to select from.

    Their scale makes updates of AdamW `alpha / r` times as large: multiply the learning rate instead. They write into
    the pretrained weight; here the difference is held beside it, and weight decay pulls that to 0.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "column",
        "units": None if "density" in fields else 16,
        "score": "random",
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
