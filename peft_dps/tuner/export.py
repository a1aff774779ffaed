"""Files for sharing: an adapter as the exact difference to its base model, or as a LoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from torch.distributed.tensor import DTensor

from peft_dps.errors import ConfigError, EngineError
from peft_dps.tensors.difference import encode
from peft_dps.tuner.adapter_name import one_adapter
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.lora_export import LoraReport, export_lora
from peft_dps.tuner.peft_interface import (
    EMBEDDING_LAYER_NAMES,
    SAFETENSORS_WEIGHTS_NAME,
    PeftModel,
    get_peft_model_state_dict,
)
from peft_dps.tuner.targets import is_named
from peft_dps.tuner.trained_tensors import TrainedTensor, trained_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        adapter: Name of the adapter.
        file_bytes: Size of the file of weights.
        whole_bytes: What the adapter's tensors take in the file that `save_pretrained` writes.
    """

    adapter: str
    file_bytes: int
    whole_bytes: int

    @property
    def ratio(self) -> float:
        """Size of the file as a fraction of `whole_bytes`."""
        return self.file_bytes / self.whole_bytes

    def __str__(self) -> str:
        return f"adapter {self.adapter!r}: {self.file_bytes} bytes, {self.ratio:.1%} of its size, without loss"


@overload
def export_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    adapter_name: str | None = None,
    form: Literal["difference"] = "difference",
    whole: Iterable[str] = (),
    saved_modules: Iterable[str] = (),
) -> ExportReport: ...


@overload
def export_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    adapter_name: str | None = None,
    form: Literal["lora"],
    rank: int | None = None,
) -> LoraReport: ...


def export_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    adapter_name: str | None = None,
    form: Literal["difference", "lora"] = "difference",
    whole: Iterable[str] = (),
    saved_modules: Iterable[str] = (),
    rank: int | None = None,
) -> ExportReport | LoraReport:
    """Save an adapter in a small form, or as a LoRA. The model in memory stays as it is.

    `form="difference"` compresses the difference to the pretrained weights; every bit comes back.
    `PeftModel.from_pretrained`, `load_adapter` and `AutoPeftModel...` add it to those of the base model that they are
    given, once `peft_dps` is imported, and refuse any other base model. An adapter with `storage="compact"` gets no
    smaller by it: `save_pretrained` writes the selected units alone.

    `form="lora"` writes the rows or columns of an adapter with `storage="compact"` as a LoRA that computes the same.
    Whatever takes a LoRA loads it, without `peft_dps`.

    Args:
        model: The model that `get_peft_model` or `PeftModel.from_pretrained` returned.
        path: Folder to write, as `save_pretrained` does: an adapter named "default" goes there, another one into a
            folder of its name in it.
        adapter_name: Name of the adapter; None for the active one.
        form: `"difference"` or `"lora"`.
        whole: Names of targeted modules, or ends of their paths, whose difference is not stored, but they themselves:
            those that are new in each model, such as a head without `task_type`.
        saved_modules: Names of modules in `modules_to_save`, or ends of their paths, of which the difference is
            stored too. By default they are whole. Name those that come from the base model's own file, embeddings
            for instance, and no new head.
        rank: Rank of all layers of the LoRA, filled up with zeros. By default the number of units that a layer has,
            and one for all layers if the configuration has `units`.

    Returns:
        Sizes; of a LoRA, its ranks too, and whether vLLM can serve it.

    Raises:
        ConfigError: If an argument cannot work, or names what the model does not have, or the adapter has no such
            form.
        TargetError: If there is no LoRA of one of the layers.
        EngineError: If the weights are sharded.
    """
    _require_options(form, whole=whole, saved_modules=saved_modules, rank=rank)
    folder = _folder(path)
    adapter = _adapter_of(model, adapter_name)
    if form == "lora":
        return export_lora(model, folder, adapter, rank)
    config: Any = model.peft_config[adapter]
    if config.storage == "compact":
        logger.warning(
            "Adapter %r has `storage='compact'`, of which `form='difference'` makes no smaller file than "
            "`save_pretrained`. `form='lora'` makes one of rows and columns that loads without peft_dps.",
            adapter,
        )
    tensors = list(trained_tensors(model, adapter))
    whole, saved_modules = tuple(whole), tuple(saved_modules)
    layers = {tensor.module for tensor in tensors if tensor.in_layer}
    _require_known("whole", whole, layers)
    _require_known("saved_modules", saved_modules, {tensor.module for tensor in tensors if not tensor.in_layer})
    state: dict[str, Any] = dict(model.state_dict())
    for tensor in tensors:
        if is_named(tensor.module, whole if tensor.in_layer else saved_modules) != tensor.in_layer:
            state[tensor.key] = _encoded(tensor)
    # PEFT adds the base model's embeddings where they are targets; here the base has to be the same anyway.
    has_embeddings = any(layer.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for layer in layers)
    options: dict[str, Any] = {"save_embedding_layers": False if has_embeddings else "auto"}
    model.save_pretrained(str(folder), selected_adapters=[adapter], state_dict=state, **options)
    saved = get_peft_model_state_dict(model, adapter_name=adapter, **options)
    return ExportReport(
        adapter=adapter,
        file_bytes=Path(folder, "" if adapter == "default" else adapter, SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        whole_bytes=sum(tensor.nbytes for tensor in saved.values()),
    )


def _require_options(form: Any, *, whole: Any, saved_modules: Any, rank: Any) -> None:
    if form not in ("difference", "lora"):
        raise ConfigError(f"`form` must be 'difference' or 'lora', got {form!r}.")
    for name, value in (("whole", whole), ("saved_modules", saved_modules)):
        if isinstance(value, str):
            raise ConfigError(f"`{name}` must be a list of names, got {value!r}. Use `[{value!r}]`.")
    others = {"rank": rank} if form == "difference" else {"whole": whole, "saved_modules": saved_modules}
    for name, value in others.items():
        if value not in (None, ()):
            raise ConfigError(f"`{name}={value!r}` has nothing to do with `form={form!r}`. Leave it out.")


def _folder(path: Any) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise ConfigError(f"`path` must name the folder to write, as a str or Path, got {path!r}.")
    return Path(path)


def _adapter_of(model: PeftModel, adapter: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"`model` must be a PeftModel, got {type(model).__name__}. Of DDP take `model.module`, of `torch.compile` "
            "`model._orig_mod`."
        )
    adapter = one_adapter(adapter, model.active_adapters)
    if not isinstance(model.peft_config.get(adapter), DPSConfig):
        raise ConfigError(f"`adapter_name` must name a DPS adapter of the model, got {adapter!r}.")
    return adapter


def _encoded(tensor: TrainedTensor) -> Any:
    if isinstance(tensor.value, DTensor):
        raise EngineError(
            f"The weight {tensor.key!r} is sharded, so its difference cannot be stored. Save the adapter with "
            "`save_pretrained`, load it in one process, and export it there."
        )
    return encode(tensor.value, tensor.pretrained)


def _require_known(field: str, names: Iterable[str], paths: set[str]) -> None:
    for name in names:
        if not any(is_named(path, [name]) for path in paths):
            raise ConfigError(f"`{field}` names {name!r}, which is none of the modules: {', '.join(sorted(paths))}.")
