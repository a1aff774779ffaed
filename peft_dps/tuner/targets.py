"""Which modules an adapter trains: those that DPS wraps, and those that PEFT trains in full beside them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from peft_dps.errors import TargetError
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.peft_interface import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft_dps.tuner.quantized import is_packed, is_quantized, linear_shape, remedy_for_quantized

logger = logging.getLogger(__name__)

# Heads that PEFT trains in full. For these tasks it says so only after the targets have been wrapped.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def expand_all_linear(config: DPSConfig, model: nn.Module) -> None:
    """Put the names of all linear modules, without heads, in place of "all-linear" in `target_modules`."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    packed = next((key for key, module in model.named_modules() if is_packed(module)), None)
    if packed is not None and config.recipe().reads_base:
        raise TargetError(
            f"The model is quantized ({packed!r} is a {type(model.get_submodule(packed)).__name__}), so 'all-linear' "
            f"would leave most of it out. {remedy_for_quantized(config.storage, config.granularity)}"
        )
    quantized = _quantized_linears(model)
    _maybe_include_all_linear_layers(config, model)
    # What another adapter saves in full is no part of the base model: a checkpoint must not name its insides.
    wrapped = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    closed = wrapped + _HEADS.get(str(config.task_type), ())
    # PEFT takes every module for one to save whose path ends like a name, as 'pre_classifier' like 'classifier'.
    saved = tuple(config.modules_to_save or ())
    names = sorted({*config.target_modules, *quantized})
    config.target_modules = [name for name in names if not name.startswith(closed) and not name.endswith(saved)]


def _quantized_linears(model: nn.Module) -> set[str]:
    """Return the paths of quantized linear layers, of which PEFT finds those alone that are `torch.nn.Linear`."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        key
        for key, module in model.named_modules()
        if not key.startswith(inside)
        and not isinstance(module, BaseTunerLayer)
        and module is not head
        and is_quantized(module)
        and linear_shape(module) is not None
    }


def is_target(config: DPSConfig, key: str) -> Any:
    """Tell whether the module at a path is a target, in PEFT's terms."""
    found = check_target_module_exists(config, key)
    if not found or config.layers_to_transform is None:
        return found
    # PEFT forgets `layers_to_transform` for modules named in full, which is what "all-linear" becomes.
    return _layer_index(key, config.layers_pattern) in _as_list(config.layers_to_transform)


def refuse_separate_experts(config: DPSConfig, model: nn.Module) -> None:
    """Refuse parameters of experts where each expert is a module of its own."""
    for name in config.target_parameters or ():
        parent = name.rpartition(".")[0]
        for key, module in model.named_modules():
            if parent and isinstance(module, nn.ModuleList) and is_named(key, [parent]):
                raise TargetError(
                    f"`target_parameters` has {name!r}, but {key!r} is a list of {len(module)} modules: transformers "
                    f"{transformers.__version__} keeps experts of this model apart. Experts in one parameter need "
                    "transformers 5; or name their linear layers in `target_modules`."
                )


def is_named(key: str, names: Iterable[str]) -> bool:
    """Tell whether one of the names is a path, or the end of it that begins after a dot."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def save_remaining(config: DPSConfig, model: nn.Module) -> None:
    """Add the innermost modules that hold all other parameters to `modules_to_save`."""
    saved, parameters = config.modules_to_save or [], config.target_parameters or []
    targets = [key for key, _ in model.named_modules() if is_target(config, key)]
    remaining: list[str] = []
    done: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if key.startswith(done):
            continue
        if key in targets or any(key.endswith(name) for name in saved):
            done += (key + ".",)
        elif isinstance(module, AuxiliaryTrainingWrapper) or any(True for _ in module.parameters(recurse=False)):
            own = [is_named(f"{key}.{name}", parameters) for name, _ in module.named_parameters(recurse=False)]
            if own and all(own):
                continue
            if not key or any(own) or any(target.startswith(key + ".") for target in targets):
                logger.warning("`train_remaining` cannot reach the parameters of %r itself: they stay frozen.", key)
                continue
            remaining.append(key)
            done += (key + ".",)
    for key in remaining:
        clash = next((target for target in targets if any(part.endswith(key) for part in _paths_to(target))), None)
        if clash is not None:
            raise TargetError(
                f"`train_remaining` would train {key!r} in full, but PEFT finds modules by the end of their path and "
                f"could not tell it from the target {clash!r}. Rename it, or list `modules_to_save` yourself."
            )
    config.modules_to_save = sorted({*saved, *remaining})


def _paths_to(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[: index + 1]) for index in range(len(parts)))


def _layer_index(key: str, layers_pattern: list[str] | str | None) -> int | None:
    """Return the layer number in a module path, counted in the module lists that the patterns name."""
    patterns = _as_list(layers_pattern) or [r"[^.]+"]
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)(?:\.|$)", key)
        if match:
            return int(match.group(1))
    return None


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set)) else [value]
