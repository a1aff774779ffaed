"""Child-Tuning-D (Xu et al., EMNLP 2021, arXiv:2109.05687)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def child_tuning_d(**fields: Any) -> DPSConfig:
    """Child-Tuning-D (Xu et al., EMNLP 2021, arXiv:2109.05687): the entries of highest Fisher information, of all.

    For little data. F = mean over the data of (d log p(y | x) / dW)^2 is gathered before training by
    `model.dps_score(batches, per_example=True)`, and the 30% of all entries where it is largest are trained. The
    gradient of the others is 0; as in the paper, weight decay moves them, and modules that are no targets are trained
    in full. It costs what full fine-tuning does, and a pass over the data.

    Their code squares the clipped gradients of batches (`model.dps_score(batches)`, without the clipping), and masks
    biases and norms of the encoder too; here these are trained.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "density": 0.3,
        "scope": "model",
        "schedule": "once",
        "score_steps": 0,
        "frozen": "gradient",
        "train_remaining": True,
    }
    return DPSConfig(**{**paper, **fields})
