"""Mixout (Lee et al., ICLR 2020, arXiv:1909.11299)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def mixout(**fields: Any) -> DPSConfig:
    """Mixout: everything is trained, in forwards in which random neurons' weights are the pretrained ones.

    It keeps fine-tuning on little data close to W0: switch the model's own dropout off (`peft_dps.disable_dropout`).
    It costs the memory of full fine-tuning and W0, and computes W_eff twice in a step. The paper mixes with
    probability p = 1 - `density` of 0.7, 0.8 and 0.9.

        W_eff = W0 + b * (W - W0) / density

    with b in {0, 1} for each input column, 1 with probability `density`, so that the mean of W_eff is W. Evaluation
    uses W.

    The paper draws b in each forward, here it is drawn once for each optimizer step. The gradient is that of the
    formula, G_eff * b / density; the released code leaves out the division. `noise="mixconnect"` draws b for each
    entry, which takes more time.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {"density": 0.1, "schedule": "full", "noise": "mixout"}
    return DPSConfig(**{**paper, **fields})
