"""BitFit: only the biases are trained."""

from __future__ import annotations

from transformers import PreTrainedModel

from peft_dps.compare.methods.head import head_parameters, train_only


def apply_bitfit(model: PreTrainedModel) -> PreTrainedModel:
    """Train every bias term and the head, as Ben Zaken et al. do (ACL 2022, arXiv:2106.10199).

    In y = W x + b, and in the same way in layer normalization, W keeps its pretrained value and b is trained. PEFT's
    BEFT is something else: it adds new vectors to chosen projections.

    Args:
        model: A model with a head; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: It has no bias terms.
    """
    biases = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    head = head_parameters(model)
    if not biases - head:
        raise ValueError(f"BitFit needs a model with bias terms, and {type(model).__name__} has none.")
    train_only(model, biases | head)
    return model
