"""Small files for sharing: an adapter as the difference to its base model, exact or rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from peft_dps.errors import ConfigError, EngineError
from peft_dps.selection.topk import select
from peft_dps.tensors.packed import add_delta, pack, pack_delta
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.loading import own_tensors, saved_tensors

Packed = tuple[torch.Tensor, torch.Tensor]  # the packed tensor, and what it will be unpacked to


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and what it lost.

    Attributes:
        form: The form asked for.
        adapter: Name of the adapter.
        file_bytes: Size of the file of weights.
        whole_bytes: What the adapter's tensors take in the file that `save_pretrained` writes.
        relative_error: ||restored - trained|| / ||trained - pretrained|| over all packed entries; 0.0 if lossless.
        largest_error: The largest |restored - trained| of an entry.
    """

    form: str
    adapter: str
    file_bytes: int
    whole_bytes: int
    relative_error: float
    largest_error: float

    @property
    def ratio(self) -> float:
        """Size of the file as a fraction of `whole_bytes`."""
        return self.file_bytes / self.whole_bytes

    def __str__(self) -> str:
        loss = (
            "without loss"
            if self.largest_error == 0.0
            else f"with an error of {self.relative_error:.2%} of the change, {self.largest_error:.1e} at most"
        )
        return f"adapter {self.adapter!r} as {self.form!r}: {self.file_bytes} bytes, {self.ratio:.1%}, {loss}"


def _exact(trained: torch.Tensor, pretrained: torch.Tensor, keep: float) -> Packed:
    return pack(trained, pretrained), trained


def _base_dtype(trained: torch.Tensor, pretrained: torch.Tensor, keep: float) -> Packed:
    rounded = trained.to(pretrained.dtype)
    return pack(rounded, pretrained), rounded


def _bfloat16(trained: torch.Tensor, pretrained: torch.Tensor, keep: float) -> Packed:
    delta = (trained - pretrained.to(trained.dtype)).to(torch.bfloat16)
    return pack_delta(delta, pretrained, trained.dtype), add_delta(delta, pretrained, trained.dtype)


def _top(trained: torch.Tensor, pretrained: torch.Tensor, keep: float) -> Packed:
    reference = pretrained.to(trained.dtype)
    change = (trained - reference).abs().float().nan_to_num(nan=math.inf, posinf=math.inf)
    kept = torch.where(select(change, keep), trained, reference)
    return pack(kept, pretrained), kept


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], Packed]] = {
    "exact": _exact,
    "base_dtype": _base_dtype,
    "bfloat16": _bfloat16,
    "top": _top,
}


def export_adapter(
    model: PeftModel,
    path: str | Path,
    form: str = "exact",
    *,
    keep: float = 0.1,
    adapter_name: str | None = None,
    whole: Iterable[str] = (),
    saved_modules: Iterable[str] = (),
) -> ExportReport:
    """Save an adapter in a small form, which PEFT loads like any other once `peft_dps` is imported.

    What is stored is the difference to the pretrained weights, compressed; `PeftModel.from_pretrained`, `load_adapter`
    and `AutoPeftModel...` add it to those of the base model they are given, and refuse any other base model. The model
    in memory stays as it is.

    Args:
        model: The model that `get_peft_model` or `PeftModel.from_pretrained` returned.
        path: Folder to write, as `save_pretrained` does: an adapter named "default" goes there, another one into a
            folder of its name in it.
        form: `"exact"`: every bit comes back. `"base_dtype"`: the weights rounded to the dtype of the base model's,
            as merging rounds them; without loss if they have that dtype. `"bfloat16"`: the difference rounded to
            bfloat16. `"top"`: the entries that changed most, exactly; the others become the pretrained ones.
        keep: For `"top"`, the fraction of entries of each weight that is kept, in (0, 1].
        adapter_name: Name of the adapter; None for the active one.
        whole: Names of targeted modules, or ends of their paths, that are stored whole: those that are new in each
            model, such as a head without `task_type`.
        saved_modules: Names of modules in `modules_to_save`, or ends of their paths, of which the difference is
            stored too. By default they are whole. Name those that come from the base model's own file, embeddings
            for instance, and no new head.

    Returns:
        Sizes, and the error of a form that loses something.

    Raises:
        ConfigError: If `form`, `keep`, or a name is unknown or out of range.
        EngineError: If the weights are sharded.
    """
    if form not in FORMS:
        raise ConfigError(f"`form` must be one of {', '.join(map(repr, FORMS))}, got {form!r}.")
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"`keep` must be in (0, 1], got {keep!r}.")
    adapter = _adapter_of(model, adapter_name)
    state: dict[str, Any] = dict(model.state_dict())
    loss = _Loss()
    for key, trained, pretrained in _chosen(model, adapter, tuple(whole), tuple(saved_modules)):
        state[key], restored = FORMS[form](trained, pretrained, keep)
        loss.add(trained, pretrained, restored)
    embeddings = _base_embeddings(model, adapter)
    model.save_pretrained(str(path), selected_adapters=[adapter], state_dict=state, save_embedding_layers=embeddings)
    folder = Path(path) if adapter == "default" else Path(path) / adapter
    return ExportReport(
        form=form,
        adapter=adapter,
        file_bytes=(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        whole_bytes=sum(
            tensor.numel() * tensor.element_size()
            for tensor in get_peft_model_state_dict(
                model, adapter_name=adapter, save_embedding_layers=embeddings
            ).values()
        ),
        relative_error=loss.relative,
        largest_error=loss.largest,
    )


class _Loss:
    def __init__(self) -> None:
        self.change = self.error = self.largest = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.change) if self.error else 0.0

    def add(self, trained: torch.Tensor, pretrained: torch.Tensor, restored: torch.Tensor) -> None:
        values = trained.double()
        self.change += float((values - pretrained.double()).nan_to_num(nan=0.0).square().sum())
        if restored is trained or not trained.numel():
            return
        miss = (restored.double() - values).nan_to_num(nan=0.0).abs()
        self.error += float(miss.square().sum())
        self.largest = max(self.largest, float(miss.max()))


def _adapter_of(model: PeftModel, adapter: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise ConfigError(f"`model` must be a PeftModel, got {type(model).__name__}.")
    if adapter is None:
        if len(model.active_adapters) != 1:
            raise ConfigError(f"`adapter_name` is needed, since the active adapters are {model.active_adapters}.")
        adapter = model.active_adapters[0]
    config = model.peft_config.get(adapter)
    if not isinstance(config, DPSConfig):
        raise ConfigError(f"`adapter_name` must name a DPS adapter of the model, got {adapter!r}.")
    return adapter


def _chosen(
    model: PeftModel, adapter: str, whole: tuple[str, ...], saved: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Go through the tensors to pack: name in the state dict, trained and pretrained values on the CPU."""
    own, kept = list(own_tensors(model, adapter)), list(saved_tensors(model, adapter))
    own_paths = {key: key.rpartition(".dps_")[0] for key, _, _ in own}
    kept_paths = {key: key.partition(".modules_to_save.")[0] for key, _, _ in kept}
    _require_known("whole", whole, own_paths.values())
    _require_known("saved_modules", saved, kept_paths.values())
    for key, trained, pretrained in [*own, *kept]:
        if key in own_paths:
            is_packed = not any(_names(name, own_paths[key]) for name in whole)
        else:
            is_packed = any(_names(name, kept_paths[key]) for name in saved)
        if not is_packed:
            continue
        if type(trained.data).__name__ == "DTensor":
            raise EngineError(
                f"The weight {key!r} is sharded, so its difference cannot be stored. Save the adapter with "
                "`save_pretrained`, load it in one process, and export it there."
            )
        yield key, trained.detach().cpu(), pretrained.detach().cpu()


def _base_embeddings(model: PeftModel, adapter: str) -> bool | Literal["auto"]:
    """Tell PEFT to leave out the base model's embeddings if they are targets: the base has to be the same anyway."""
    modules = {key.rpartition(".dps_")[0].rpartition(".")[2] for key, _, _ in own_tensors(model, adapter)}
    return "auto" if modules.isdisjoint(EMBEDDING_LAYER_NAMES) else False


def _names(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _require_known(field: str, names: Iterable[str], paths: Iterable[str]) -> None:
    paths = set(paths)
    for name in names:
        if not any(_names(name, path) for path in paths):
            raise ConfigError(f"`{field}` names {name!r}, which is none of the modules: {', '.join(sorted(paths))}.")
