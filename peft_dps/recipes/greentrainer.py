"""GreenTrainer (Huang et al., 2023, arXiv:2309.13192)."""

from __future__ import annotations

from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.tuner.config import DPSConfig


def greentrainer(rho: float = 0.5, **fields: Any) -> DPSConfig:
    """GreenTrainer: the weights that matter most within a number of FLOPs (Huang et al., arXiv:2309.13192).

    Use it to spend less time on a step: `rho` is the fraction of the FLOPs of a training step that may be spent. A
    forward pass takes a third of them, so the backward pass has the fraction density = (3 rho - 1) / 2 of its own.
    Of all sets of weights within that, dynamic programming finds the one with the highest importance. It is selected
    anew every `stage_steps`, a fifth of the training, from the gradients of one step. Such a step costs a whole
    backward pass, and trains what was selected before, at first nothing.

    The paper's importance is the sum of g * dw, with the update dw that the optimizer is about to make. A weight that
    is not trained has none, so this takes that of gradient descent, the sum of g * g. The released code also counts
    biases, norms and the inner products of attention, and rounds costs down, so that it may exceed `rho`; here costs
    are exact or rounded up.

    Args:
        rho: Fraction of the FLOPs of a step of full fine-tuning, above 1/3 and up to 1.
        **fields: Fields of `DPSConfig` to set otherwise.

    Raises:
        ConfigError: If `rho` is out of range.
    """
    given: Any = rho
    if not isinstance(given, (int, float)) or not 1 / 3 < given <= 1:
        raise ConfigError(f"`rho` must be above 1/3, which the forward pass takes, and at most 1, got {rho!r}.")
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "tensor",
        "budget": "flops",
        "density": (3 * rho - 1) / 2,
        "reduction": "sum",
        "schedule": "every",
        "stage_steps": 0.2,
        "score_steps": 1,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
