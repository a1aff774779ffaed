"""A compact adapter written as a LoRA, which computes the same and needs nothing of this package to be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from peft_dps.errors import ConfigError, EngineError, TargetError
from peft_dps.masking.compact.delta import Delta
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.layers.conv import Conv
from peft_dps.tuner.layers.embedding import Embedding
from peft_dps.tuner.layers.layer import DPSLayer
from peft_dps.tuner.layers.linear import Conv1DLinear
from peft_dps.tuner.layers.parameter import ParamWrapper, path_in_base
from peft_dps.tuner.peft_interface import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, LoraConfig, PeftModel
from peft_dps.tuner.targets import is_named

_PREFIX = "base_model.model."
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for `--max-lora-rank`

Factors = tuple[torch.Tensor, torch.Tensor]  # A and B


@dataclass(frozen=True)
class LoraReport:
    """What an export as a LoRA wrote.

    Attributes:
        adapter: Name of the adapter.
        file_bytes: Size of the file of weights.
        ranks: Per path of a layer, the rank of its LoRA.
        not_served: Why vLLM cannot serve it; empty if it can.
    """

    adapter: str
    file_bytes: int
    ranks: Mapping[str, int]
    not_served: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(self.ranks.values())

    @property
    def max_lora_rank(self) -> int | None:
        """What vLLM is to be given as `--max-lora-rank`; None if it cannot serve the LoRA."""
        return None if self.not_served else next(rank for rank in _SERVED_RANKS if rank >= self.rank)

    def __str__(self) -> str:
        served = f"vLLM serves it with --max-lora-rank {self.max_lora_rank}"
        if self.not_served:
            served = f"PEFT loads it, vLLM does not: {'; '.join(self.not_served)}"
        return f"adapter {self.adapter!r}: a LoRA of rank {self.rank}, {self.file_bytes} bytes, without loss; {served}"


def export_lora(model: PeftModel, folder: Path, adapter: str, rank: int | None) -> LoraReport:
    """Write a compact adapter of rows or columns as a LoRA.

    Args:
        model: The model.
        folder: Where an adapter named "default" goes; another one goes into a folder of its name in it.
        adapter: Name of the adapter.
        rank: Rank of all layers, at least that of each; None for as little as will do.

    Returns:
        What was written, and whether it can be served.

    Raises:
        ConfigError: If the adapter is none of rows or columns in compact storage, has selected nothing, has trained
            biases, or has more units than the rank.
        TargetError: If there is no LoRA of one of the layers.
        EngineError: If the weights are sharded.
    """
    config: Any = model.peft_config[adapter]
    layers = _layers(model, adapter)
    factors = {path: _factors(layer, adapter, path) for path, layer in layers.items()}
    rank = _one_rank(config, {path: len(a) for path, (a, _) in factors.items()}, rank)
    if rank is not None:
        factors = {path: _padded(pair, rank) for path, pair in factors.items()}
    lora = _lora_config(model, config, layers, {path: len(a) for path, (a, _) in factors.items()})
    tensors = {
        _PREFIX + path + suffix: tensor
        for path, pair in factors.items()
        for suffix, tensor in zip(_suffixes(layers[path]), pair, strict=True)
    }
    tensors.update(_saved_modules(model, adapter))
    own = folder if adapter == "default" else folder / adapter
    own.mkdir(parents=True, exist_ok=True)
    file = own / SAFETENSORS_WEIGHTS_NAME
    save_file({key: _for_file(tensor) for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    lora.save_pretrained(str(own), auto_mapping_dict=_base_class(model) if config.task_type is None else None)
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    return LoraReport(
        adapter=adapter,
        file_bytes=file.stat().st_size,
        ranks=ranks,
        not_served=tuple(_not_served(lora, layers, ranks)),
    )


def _layers(model: PeftModel, adapter: str) -> dict[str, DPSLayer]:
    """Collect the layers to which the adapter adds something, by their paths in the base model."""
    tuner: Any = model.base_model
    layers = {
        path_in_base(tuner.model, key): module
        for key, module in tuner.model.named_modules()
        if isinstance(module, DPSLayer) and module.trained(adapter) is not None
    }
    for path, layer in layers.items():
        _require_units(layer.delta(adapter), adapter)
        _require_pretrained_bias(layer, adapter, path)
    holding = {path: layer for path, layer in layers.items() if _delta(layer, adapter).parts()}
    if not holding:
        raise ConfigError(
            f"`form='lora'` writes the units that adapter {adapter!r} has selected, and it has selected none yet. "
            "Train it past its `score_steps`, or score before training (`model.dps_score(batches)`)."
        )
    return holding


def _delta(layer: DPSLayer, adapter: str) -> Delta:
    delta: Any = layer.dps_delta[adapter]
    return delta  # type: ignore[no-any-return]


def _require_units(delta: Delta | None, adapter: str) -> None:
    if delta is None:
        raise ConfigError(
            f"`form='lora'` needs an adapter with `storage='compact'`, and {adapter!r} has `storage='copy'`: it "
            "trains whole weights, whose differences have no small rank. Use `form='difference'`, merge the adapter "
            "(`merge_and_unload`), or let PEFT approximate it (`peft.convert_to_lora`)."
        )
    if not delta.is_slices:
        raise ConfigError(
            f"`form='lora'` needs `granularity='row'` or `'column'`, and adapter {adapter!r} selects entries, tiles "
            "or whole weights, whose differences have no small rank. Use `form='difference'`, or merge the adapter "
            "(`merge_and_unload`)."
        )


def _require_pretrained_bias(layer: DPSLayer, adapter: str, path: str) -> None:
    bias = layer.trained_bias(adapter)
    if bias is not None:
        _whole(bias, path)
    if layer.has_changed_bias(adapter):
        raise ConfigError(
            f"`form='lora'` has no place for biases, and adapter {adapter!r} has trained that of {path!r}. Train with "
            "`train_bias=False`, use `form='difference'`, or merge the adapter (`merge_and_unload`)."
        )


def _whole(tensor: torch.Tensor, path: str) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        raise EngineError(
            f"The adapter of {path!r} is sharded, so no LoRA can be made of it. Save the adapter with "
            "`save_pretrained`, load it in one process, and export it there."
        )
    return tensor.detach()


def _factors(layer: DPSLayer, adapter: str, path: str) -> Factors:
    """Return A and B, whose product is what the adapter adds to a layer; one of them only picks units."""
    delta = _delta(layer, adapter)
    parts = delta.parts()
    values = torch.cat([_whole(own, path) for own, _ in parts], dim=delta.axis)
    numbers = torch.cat([numbers for _, numbers in parts]).long()
    # PEFT's LoRA of an embedding maps tokens to dimensions, as a linear layer that stores its weight transposed.
    transposed = isinstance(layer, (Conv1DLinear, Embedding))
    columns = delta.axis == (0 if transposed else 1)
    values = values.t() if transposed else values
    if isinstance(layer, Conv):
        _require_lora_conv(layer, columns, path)
    others = [1] * (values.dim() - 2)
    pick = values.new_zeros((len(numbers), layer.in_features if columns else layer.out_features))
    pick[torch.arange(len(numbers), device=pick.device), numbers] = 1
    if columns:
        return pick.view(*pick.shape, *others), values
    return values, pick.t().reshape(*pick.t().shape, *others)


def _require_lora_conv(layer: Conv, columns: bool, path: str) -> None:
    """Refuse convolutions whose LoRA, a convolution and a 1x1 one after it, would compute something else."""
    base: Any = layer.get_base_layer()
    problem = None
    if base.groups != 1:
        problem = f"groups={base.groups}"
    elif any(step != 1 for step in base.dilation):
        problem = f"dilation={base.dilation}"
    elif base.padding_mode != "zeros":
        problem = f"padding_mode={base.padding_mode!r}"
    elif columns and any(length != 1 for length in base.kernel_size):
        problem = f"columns of a kernel of {base.kernel_size}"
    if problem is not None:
        raise TargetError(
            f"The convolution {path!r} has {problem}, which PEFT's LoRA of a convolution cannot express. Leave it out "
            "with `exclude_modules`, use `granularity='row'` where its kernel is the reason, or merge the adapter "
            "(`merge_and_unload`)."
        )


def _one_rank(config: DPSConfig, ranks: Mapping[str, int], rank: Any) -> int | None:
    """Return the rank that all layers are to have; None if each has its own."""
    most = max(ranks.values())
    if rank is None:
        return most if config.units is not None else None
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < most:
        raise ConfigError(f"`rank` must be an integer of at least {most}, as many units as a layer has, got {rank!r}.")
    return rank


def _padded(factors: Factors, rank: int) -> Factors:
    """Give factors a larger rank with zeros, which add nothing."""
    a, b = factors
    more = rank - len(a)
    return (
        torch.cat([a, a.new_zeros((more, *a.shape[1:]))]),
        torch.cat([b, b.new_zeros((len(b), more, *b.shape[2:]))], dim=1),
    )


def _suffixes(layer: DPSLayer) -> tuple[str, str]:
    if isinstance(layer, Embedding):
        return ".lora_embedding_A", ".lora_embedding_B"
    return ".lora_A.weight", ".lora_B.weight"


def _lora_config(
    model: PeftModel, config: DPSConfig, layers: Mapping[str, DPSLayer], ranks: Mapping[str, int]
) -> LoraConfig:
    """Make the configuration. Each layer is scaled by alpha / r = 1, also for who reads one rank for all layers."""
    base: Any = model.get_base_model()
    most = max(ranks.values())
    # PEFT takes keys for ends of paths unless they begin with ^.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != most}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_target_modules(model, ranks),
        fan_in_fan_out=any(isinstance(layer, Conv1DLinear) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path or getattr(base, "name_or_path", None),
        revision=config.revision,
        inference_mode=True,
    )


def _target_modules(model: PeftModel, targets: Iterable[str]) -> list[str] | str:
    """Name the targets as a user of LoRA would: by the ends of their paths, if these are no others' too."""
    paths = sorted(targets)
    others = _modules_of_base(model) - set(paths)
    for names in (sorted({path.rpartition(".")[2] for path in paths}), paths):
        if not any(is_named(key, names) for key in others):
            return names
    return "|".join(map(re.escape, paths))


def _modules_of_base(model: PeftModel) -> set[str]:
    """Collect the paths of the base model's modules, of which PEFT looks for targets."""
    tuner: Any = model.base_model
    inside: tuple[str, ...] = ()
    found = set()
    for key, module in tuner.model.named_modules():
        if key.startswith(inside):
            continue
        found.add(path_in_base(tuner.model, key))
        if isinstance(module, ParamWrapper):
            inside += tuple(f"{key}.{name}" for name in ParamWrapper.adapter_layer_names)
        elif isinstance(module, (DPSLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{key}.",)
    return found


def _saved_modules(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Collect the tensors of `modules_to_save`, named as PEFT names them in a file."""
    saved: dict[str, torch.Tensor] = {}
    for key, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper: Any = module
            own = wrapper.adapter_state_dict(adapter, module.state_dict())
            saved.update({f"{key}.{name}": _whole(tensor, key) for name, tensor in own.items()})
    return saved


def _for_file(tensor: torch.Tensor) -> torch.Tensor:
    # A copy: in a file of safetensors no two tensors may share memory, as those of tied modules do.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _base_class(model: PeftModel) -> dict[str, str]:
    base = type(model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _not_served(lora: LoraConfig, layers: Mapping[str, DPSLayer], ranks: Mapping[str, int]) -> list[str]:
    """Tell what vLLM refuses, or would compute something else with."""
    reasons = []
    if lora.modules_to_save:
        names = ", ".join(sorted(lora.modules_to_save))
        reasons.append(f"it has `modules_to_save` ({names}): merge the adapter instead")
    if any(isinstance(layer, Conv) for layer in layers.values()):
        reasons.append("it has convolutions, whose LoRAs vLLM does not know: merge the adapter instead")
    if lora.rank_pattern:
        least, most = min(ranks.values()), max(ranks.values())
        reasons.append(f"its ranks are {least} to {most}, and vLLM reads one: export it with `rank={most}`")
    if max(ranks.values()) > _SERVED_RANKS[-1]:
        reasons.append(f"its rank is more than {_SERVED_RANKS[-1]}: train fewer units, or merge the adapter instead")
    return reasons
