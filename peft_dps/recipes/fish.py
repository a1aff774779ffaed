"""FISH mask (Sung et al., NeurIPS 2021, arXiv:2111.09839)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def fish(**fields: Any) -> DPSConfig:
    """FISH mask (Sung et al., NeurIPS 2021, arXiv:2111.09839): 0.5% of all entries, of highest Fisher information.

    A small adapter to share: an entry takes 8 bytes in a file. F = sum over 1024 examples of (d log p(y | x) / dW)^2,
    with the labels of the data. Gather it by `model.dps_score(batches, per_example=True)`. Each layer's backward pass
    still makes one whole gradient of its weight.

    Their code ranks all parameters, biases and norms too, and trains the classifier in full (`modules_to_save`); here
    weights of targets are ranked.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "density": 0.005,
        "scope": "model",
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
