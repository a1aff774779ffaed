"""Methods that select whole weights."""

from __future__ import annotations

from typing import Any

from peft_dps.errors import ConfigError
from peft_dps.tuner.config import DPSConfig


def hft(**fields: Any) -> DPSConfig:
    """HFT: a random half of the weights is trained, the other half keeps its values (Hui et al., arXiv:2404.18466).

    The half is that of each category: two of the four matrices of attention of each layer of the model, and of three
    feed-forward matrices two in a random half of the layers and one in the others (`budget="units"`). Embeddings, the
    head and norms are trained in full. For one training after another give each another `seed`.

    Use it in place of full fine-tuning where the model is not to forget what it knows. Trained weights cost what they
    cost in full fine-tuning, and the others share the base model's memory: no gradient, no optimizer state. Scoring
    costs nothing.

    The paper trains half of the norms; here all are. Leave them and the embeddings frozen with
    `train_remaining=False`: the backward pass then ends at the lowest trained weight. Biases of the layers are frozen.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    half: dict[str, Any] = {
        "storage": "compact",
        "granularity": "tensor",
        "scope": "category",
        "budget": "units",
        "density": 0.5,
        "score": "random",
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
        "train_remaining": True,
    }
    return DPSConfig(**{**half, **fields})


def greentrainer(rho: float = 0.5, **fields: Any) -> DPSConfig:
    """GreenTrainer: the weights that matter most within a number of FLOPs (Huang et al., arXiv:2309.13192).

    `rho` is the fraction of the FLOPs of a training step that is to be spent. A forward pass takes a third of them,
    so the backward pass has the fraction density = (3 rho - 1) / 2 of its own: for each trained weight those of its
    gradient, and those of the inputs' gradients down to the lowest. Of all sets of weights within that, the one with
    the highest importance is trained, found by dynamic programming. It is selected anew every `stage_steps`, a fifth
    of the training by default, as an epoch of five, from the gradients of one step.

    Use it to spend less time on a step; the time follows the FLOPs where matrix products take most of it. A step of
    scoring costs a whole backward pass, and trains what was selected before, at first nothing.

    The paper's importance of a weight is the sum of g * dw, with the update dw that the optimizer is about to make. A
    weight that is not trained has no optimizer state to tell dw from, so this takes that of gradient descent: the sum
    of g * g (`reduction="sum"`), over the passes of the step. The released code also counts biases and norms, counts
    the inner products of attention, charges the lowest trained weight for its own input's gradient, and rounds costs
    down to thousandths of the whole, so that it may exceed `rho`; here costs are exact or rounded up.

    Args:
        rho: Fraction of the FLOPs of a step of full fine-tuning, above 1/3 and up to 1.
        **fields: Fields of `DPSConfig` to set otherwise.

    Raises:
        ConfigError: If `rho` is out of range.
    """
    given: Any = rho
    if not isinstance(given, (int, float)) or not 1 / 3 < given <= 1:
        raise ConfigError(f"`rho` must be above 1/3, which the forward pass takes, and at most 1, got {rho!r}.")
    within: dict[str, Any] = {
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
    return DPSConfig(**{**within, **fields})
