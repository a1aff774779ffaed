"""WiSE-FT: the pretrained and the fully fine-tuned weights, averaged."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from peft_dps.compare.methods.head import head_parameters


def prepare_wise_ft(model: Any, alpha: Any) -> Any:
    """Train every parameter, to be averaged afterwards (Wortsman et al., CVPR 2022, arXiv:2109.01903).

    Args:
        model: A model with a head, or None.
        alpha: Share of the trained weights in the average, in [0, 1].

    Returns:
        The same.

    Raises:
        ValueError: `alpha` is out of range.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` of wise-ft must be a number in [0, 1], got {alpha!r}.")
    return model


def average(model: Any, pretrained: PreTrainedModel, alpha: float) -> None:
    """Replace each weight by (1 - alpha) times the pretrained one plus alpha times the trained one.

    The paper's head is made from the pretrained model. Here it is new: it stays as trained, with a pooler where there
    is one.

    Args:
        model: The trained model; changed in place.
        pretrained: The same model as it was before.
        alpha: Share of the trained weights.
    """
    head, start = head_parameters(model), dict(pretrained.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in head:
                parameter.lerp_(start[name].to(parameter.device), 1 - alpha)
