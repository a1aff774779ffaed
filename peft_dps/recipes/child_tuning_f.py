"""Child-Tuning-F (Xu et al., EMNLP 2021, arXiv:2109.05687)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def child_tuning_f(**fields: Any) -> DPSConfig:
    """Child-Tuning_F: in each step another random part of the entries gets a gradient, G * M / p_F.

    A regularizer for full fine-tuning on little data. It costs a random number for each entry in each step, drawn on
    the CPU, and a mask. p_F is `density`; the paper tries 0.2, 0.3 and 0.4.

    In the paper a part p_F takes part on average; here exactly ceil(n * density) of the n entries of each weight do.
    Momentum and weight decay move all entries, as in the released optimizer. That masks every parameter; here biases
    are trained in full, and other parameters with `train_remaining`.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "density": 0.3,
        "schedule": "every",
        "stage_steps": 1,
        "score_steps": 0,
        "score": "random",
        "frozen": "scaled_gradient",
    }
    return DPSConfig(**{**paper, **fields})
