"""Dropout off, as in the paper's runs."""

from __future__ import annotations

import logging
import re
from collections.abc import MutableMapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

logger = logging.getLogger(__name__)

# Names of probabilities that transformers' models and configs keep as plain numbers.
_NAME = re.compile(r"(^|_)(dropout|pdrop|drop|layerdrop|drop_path)(_|$)")


def disable_dropout(model: nn.Module) -> dict[str, float]:
    """Set every dropout probability of a model to 0, and log what was changed.

    It reaches dropout modules and the numbers named like dropout (`attention_dropout`, `resid_pdrop`, `layerdrop`,
    ...) that modules and the model's config hold. A new head that is added later brings its own.

    Args:
        model: The model, with or without adapters; changed in place.

    Returns:
        What was changed: per path, the probability it had.
    """
    changed: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            if module.p != 0.0:
                changed[path] = module.p
                module.p = 0.0
        else:
            changed.update(_zero_numbers(module, f"{path}." if path else ""))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        changed.update(_zero_numbers(config, "config."))
    logger.info("Dropout set to 0 in %d places: %s", len(changed), ", ".join(changed))
    return changed


def _zero_numbers(holder: Any, prefix: str) -> dict[str, float]:
    changed = {}
    is_dict = isinstance(holder, MutableMapping)  # as some models keep their config
    for name, value in list(holder.items() if is_dict else getattr(holder, "__dict__", {}).items()):
        if isinstance(value, float) and value != 0.0 and _NAME.search(str(name)):
            if is_dict:
                holder[name] = 0.0
            else:
                object.__setattr__(holder, name, 0.0)  # a frozen dataclass too
            changed[f"{prefix}{name}"] = value
    return changed
