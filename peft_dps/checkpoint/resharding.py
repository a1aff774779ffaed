"""Training states for other rows: read from what other processes have saved of theirs, or one process of all.

torch.distributed.checkpoint finds which rows are in which file. Its own files hold a pickle, which is nothing to load
from strangers; its reader of safetensors does not, and the files of a training state are such.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from peft_dps.checkpoint.file import StateFile
from peft_dps.checkpoint.state import LOADING, OTHER_VALUES, check_header, damage_told, place_of, values_of
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import checksum
from peft_dps.tensors.processes import Ranks, distinct, together
from peft_dps.tensors.shards import local_part
from peft_dps.training.controller import Controller
from peft_dps.training.weight import TargetWeight


def fits(controller: Controller, header: Mapping[str, Any]) -> bool:
    """Tell whether a state is that of the rows of this process."""
    facts = header["weights"]
    return all(
        facts.get(weight.name, {}).get(name) in (None, value)  # what is missing is told later
        for weight in controller.existing
        for name, value in place_of(weight).items()
        if name != "dtype"
    )


def reshard(controller: Controller, sources: Sequence[StateFile], world: list[Ranks]) -> dict[str, Any]:
    """Make the training state of this process's rows. All processes have to call it.

    Args:
        controller: What drives the adapter's training.
        sources: The states of all processes that saved.
        world: All processes, if there are rows of several; else nothing.

    Returns:
        What `state_of` would have returned if the weights had been cut then as they are now.

    Raises:
        StateError: If the sources do not fit together, are damaged, or are those of other weights.
    """
    weights = controller.existing
    with together(world, LOADING, StateError), damage_told(f"adapter {controller.adapter!r}"):
        header = sources[0].header
        for source in sources:
            check_header(controller, source.header)
            if source.header["clock"] != header["clock"]:
                raise StateError(f"The training state at '{source.path}' is of another step than the files beside it.")
        entries = {weight.name: [source.header["weights"][weight.name] for source in sources] for weight in weights}
        for weight in weights:
            _check_cover(weight, entries[weight.name])
            _check_alike(weight, entries[weight.name])
    _check_values(weights, entries, world)
    with together(world, LOADING, StateError), damage_told(f"adapter {controller.adapter!r}"):
        for index, source in enumerate(sources):  # what all have in common is read from the last one
            if source is sources[-1] or any(_overlaps(weight, entries[weight.name][index]) for weight in weights):
                source.check()
        tensors = _read(weights, sources, entries)
        facts = {weight.name: _facts_of(weight, entries[weight.name], tensors) for weight in weights}
    return {"header": {**header, "weights": facts}, "tensors": tensors}


def _read(
    weights: Sequence[TargetWeight], sources: Sequence[StateFile], entries: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, torch.Tensor]:
    """Read this process's rows of every tensor."""
    kinds = [source.kinds() for source in sources]
    wanted: dict[str, torch.Tensor] = {}
    for weight in weights:
        found = entries[weight.name]
        for kind in found[0]["rows"]:
            key = f"{weight.name}.{kind}"
            wanted[key] = _own_rows(weight, *_kind(key, kinds, [facts["shape"][0] for facts in found]))
        for kind in found[0]["whole"]:
            key = f"{weight.name}.{kind}"
            dtype, size = _kind(key, kinds, None)
            wanted[key] = torch.empty(size, dtype=dtype, device=weight.weight.device)
    reader = HuggingFaceStorageReader(str(sources[0].path.parent))
    reader.fs = _Only([source.path for source in sources])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        try:
            load(wanted, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # which is no Exception
            raise StateError(f"The training state at '{reader.path}' is damaged: {error}") from error
    return {key: local_part(tensor) for key, tensor in wanted.items()}


def _kind(
    key: str, kinds: Sequence[Mapping[str, tuple[torch.dtype, torch.Size]]], rows: Sequence[int] | None
) -> tuple[torch.dtype, torch.Size]:
    """Return the dtype and the shape of a tensor, which has some rows in each source, or is in each as a whole."""
    dtype, size = kinds[0][key]
    expected = [size] * len(kinds) if rows is None else [torch.Size([many, *size[1:]]) for many in rows]
    if [found[key] for found in kinds] != [(dtype, each) for each in expected]:
        raise StateError(f"The tensor {key!r} of the training state is damaged: its parts do not go together.")
    return dtype, size


def _own_rows(weight: TargetWeight, dtype: torch.dtype, size: torch.Size) -> torch.Tensor:
    """Return memory for a tensor of this size, but for the number of rows, that is cut as the weight is."""
    parameter, device = weight.parameter, weight.weight.device
    local = torch.empty((weight.rows[1], *size[1:]), dtype=dtype, device=device)
    if not isinstance(parameter, DTensor):
        return local
    whole = torch.empty((parameter.shape[0], *size[1:]), device="meta")
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


class _Only(FileSystem):
    """A file system with some files."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = [_Name(path) for path in paths]

    def ls(self, path: Any) -> list[str]:
        return list(self._paths)


class _Name(str):
    """The name of a file of safetensors, which the reader knows by its ending, and users need not call it so."""

    __slots__ = ()

    def endswith(self, *_: Any) -> bool:
        return True


def _check_cover(weight: TargetWeight, found: Sequence[Mapping[str, Any]]) -> None:
    """Check that the sources hold all rows of a weight like this one, each once (or by replicas)."""
    own, row = place_of(weight), 0
    for facts in found:
        for name in ("global_shape", "dtype"):
            if facts[name] != own[name]:
                raise StateError(
                    f"The training state of {weight.name!r} is that of a weight with {name} {facts[name]}, and this "
                    f"one has {own[name]}. Resume with the same model and dtype."
                )
    by_first = {facts["offset"][0]: facts["shape"][0] for facts in found if facts["shape"][0] > 0}
    while row < own["global_shape"][0]:
        if row not in by_first:
            raise StateError(f"The training state lacks rows from {row} on of the weight of {weight.name!r}.")
        row += by_first[row]


def _check_alike(weight: TargetWeight, found: Sequence[Mapping[str, Any]]) -> None:
    """Check that all sources tell the same of a weight, but for what may be so in some of its rows alone."""
    for facts in found:
        told = [_common(each) for each in (facts, found[0])]
        if told[0] != told[1]:
            raise StateError(f"The training state of {weight.name!r} is damaged: parts tell {told[0]} and {told[1]}.")


def _common(facts: Mapping[str, Any]) -> list[Any]:
    plain = {name: type(value) if isinstance(value, bool) else value for name, value in facts["facts"].items()}
    return [plain, sorted(facts["rows"]), sorted(facts["whole"])]


def _check_values(
    weights: Sequence[TargetWeight], entries: Mapping[str, Sequence[Mapping[str, Any]]], world: list[Ranks]
) -> None:
    """Check that the weights are those of the state: checksums of parts add up to the same, however they are cut."""
    own = torch.tensor([values_of(weight) for weight in weights], device="cpu")
    sums = {ranks: ranks.sum(own) for ranks in distinct(weight.ranks for weight in weights)}
    with together(world, LOADING, StateError), damage_told("the weights"):
        for index, weight in enumerate(weights):
            found = entries[weight.name]
            saved = sum({each["offset"][0]: each["values"] for each in found if each["shape"][0] > 0}.values())
            now = int((own if weight.ranks is None else sums[weight.ranks])[index])
            if (saved - now) % 2**64:
                raise StateError(OTHER_VALUES.format(weight.name))


def _overlaps(weight: TargetWeight, facts: Mapping[str, Any]) -> bool:
    first, rows = weight.rows
    other, many = int(facts["offset"][0]), int(facts["shape"][0])
    return other < first + rows and first < other + many


def _facts_of(
    weight: TargetWeight, found: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    plain = {
        name: any(each["facts"][name] for each in found) if isinstance(value, bool) else value
        for name, value in found[0]["facts"].items()
    }
    return {
        **place_of(weight),
        "values": values_of(weight),
        "facts": plain,
        "rows": {kind: checksum(tensors[f"{weight.name}.{kind}"]) for kind in found[0]["rows"]},
        "whole": {kind: checksum(tensors[f"{weight.name}.{kind}"]) for kind in found[0]["whole"]},
    }
