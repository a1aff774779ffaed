"""Training states for other rows: read from what other processes have saved of theirs, or one process of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from peft_dps.checkpoint.file import StateFile
from peft_dps.checkpoint.state import LOADING, OTHER_VALUES, check_header, damage_told, place_of, values_of
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import checksum
from peft_dps.tensors.processes import Ranks, distinct, together
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
    read: dict[str, torch.Tensor] = {}
    for weight in weights:
        found = entries[weight.name]
        for kind in found[0]["rows"]:
            key = f"{weight.name}.{kind}"
            read[key] = torch.cat(list(_own_rows(weight, key, sources, found)))
        for kind in found[0]["whole"]:
            key = f"{weight.name}.{kind}"
            read[key] = sources[-1].rows(key, 0, None)
    return read


def _own_rows(
    weight: TargetWeight, key: str, sources: Sequence[StateFile], found: Sequence[Mapping[str, Any]]
) -> Iterator[torch.Tensor]:
    """Read the rows that are here, from one source after the other; each row once, also where there are replicas."""
    row, stop = weight.rows[0], sum(weight.rows)
    places = [(facts["offset"][0], facts["shape"][0], source) for source, facts in zip(sources, found, strict=True)]
    yield sources[0].rows(key, 0, 0)  # in case that none is here
    for first, many, source in sorted(places, key=lambda place: place[:2]):
        if source.size(key)[0] != many:
            raise StateError(f"The tensor {key!r} of the training state is damaged: its parts do not go together.")
        if first <= row < min(stop, first + many):
            yield source.rows(key, row - first, min(stop - first, many))
            row = min(stop, first + many)


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
