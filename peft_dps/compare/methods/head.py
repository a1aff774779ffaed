"""The head of a model: what comes after its layers."""

from __future__ import annotations

from transformers import PreTrainedModel

_POOLER = "pooler"


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters outside the pretrained part, and of its pooler.

    A model that was pretrained to embed texts by their mean has a pooler that nothing has trained. Methods that train
    the head alone would classify through random features there.

    Args:
        model: A model with a head, as `AutoModelForSequenceClassification` loads it.

    Raises:
        ValueError: It has none.
    """
    prefix = f"{model.base_model_prefix}."
    every = {name for name, _ in model.named_parameters()}
    names = {name for name in every if not name.startswith(prefix)}
    if names in (set(), every):
        raise ValueError(f"{type(model).__name__} has no head beside {prefix[:-1]!r}: load it with one for the task.")
    return names | {name for name in every if name.startswith(f"{prefix}{_POOLER}.")}


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that hold the head, as PEFT's `modules_to_save` takes them."""
    prefix = f"{model.base_model_prefix}."
    return sorted({name.removeprefix(prefix).split(".")[0] for name in head_parameters(model)})


def train_only(model: PreTrainedModel, names: set[str]) -> None:
    """Freeze every parameter but the named ones."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
