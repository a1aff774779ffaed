"""Training states for other rows: made from what other processes have saved of theirs, or one process of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peft_dps.masking.bits import pack, unpack
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import frozen_checksum
from peft_dps.masking.mask import Mask
from peft_dps.tensors.shards import Ranks, distinct, together
from peft_dps.checkpoint.state import LOADING, OTHER_VALUES, alive_in, check_header, checksum_of, damage_told, place_of
from peft_dps.training.controller import Subnetwork
from peft_dps.training.weight import TrackedWeight


class Source(Protocol):
    """The training state of one process, of which pieces are read."""

    header: dict[str, Any]

    def check(self) -> None:
        """Make sure that it is not damaged."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return some rows of a tensor, on the CPU; all of them by default."""


@dataclass(frozen=True)
class Piece:
    """Rows of a weight that a source has.

    Attributes:
        source: The source.
        facts: What its header tells of the weight.
        start: The first of its rows that is wanted.
        stop: The row after the last one.
    """

    source: Source
    facts: Mapping[str, Any]
    start: int
    stop: int


def fits(subnetwork: Subnetwork, header: Mapping[str, Any]) -> bool:
    """Tell whether a state is that of the rows of this process.

    Args:
        subnetwork: The adapter's weights and stages.
        header: Header of the state.
    """
    facts = header["weights"]
    return all(
        facts.get(weight.name, {}).get(name) in (None, value)  # what is missing is told later
        for weight in alive_in(subnetwork)
        for name, value in place_of(weight).items()
        if name != "dtype"
    )


def recut(subnetwork: Subnetwork, sources: Sequence[Source], world: list[Ranks]) -> dict[str, Any]:
    """Make the training state of this process's rows. All processes have to call it.

    Args:
        subnetwork: The adapter's weights and stages.
        sources: The states of all processes that saved.
        world: All processes, if there are rows of several; else nothing.

    Returns:
        What `state_of` would have returned if the weights had been cut then as they are now.

    Raises:
        StateError: If the sources do not fit together, are damaged, or are those of other weights.
    """
    weights = alive_in(subnetwork)
    with together(world, LOADING, StateError), damage_told(subnetwork):
        header = sources[0].header
        check_header(subnetwork, header)
        whole = {weight.name: _cover(weight, sources) for weight in weights}
    _check_values(subnetwork, whole, world)
    facts: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    with together(world, LOADING, StateError), damage_told(subnetwork):
        wanted = {weight.name: _overlap(weight, whole[weight.name]) for weight in weights}
        for source in {id(piece.source): piece.source for pieces in wanted.values() for piece in pieces}.values():
            source.check()
        exact = header["settings"]["frozen"] == "exact"
        for weight in weights:
            own = _tensors_of(weight.name, wanted[weight.name], exact=exact)
            tensors.update({f"{weight.name}.{kind}": tensor for kind, tensor in own.items()})
            facts[weight.name] = _facts_of(weight, wanted[weight.name], own, exact=exact)
    return {"header": {**header, "weights": facts}, "tensors": tensors}


def _cover(weight: TrackedWeight, sources: Sequence[Source]) -> list[Piece]:
    """Choose sources that have all rows of the weight, each once."""
    found = [(source, source.header["weights"][weight.name]) for source in sources]
    now, before = place_of(weight), found[0][1]
    for name in ("global_shape", "dtype"):
        if before[name] != now[name]:
            raise StateError(
                f"The training state of {weight.name!r} is that of a weight with {name} {before[name]}, and this one "
                f"has {now[name]}. Resume with the same model and dtype."
            )
    by_first = {facts["offset"][0]: (source, facts) for source, facts in found if facts["shape"][0] > 0}
    pieces, row = [], 0
    while row < before["global_shape"][0]:
        if row not in by_first:
            raise StateError(f"The training state lacks rows from {row} on of the weight of {weight.name!r}.")
        source, facts = by_first[row]
        pieces.append(Piece(source, facts, 0, facts["shape"][0]))
        row += facts["shape"][0]
    return pieces


def _check_values(subnetwork: Subnetwork, whole: Mapping[str, list[Piece]], world: list[Ranks]) -> None:
    """Check that the weights are those of the state: checksums of parts add up to the same, however they are cut."""
    weights = alive_in(subnetwork)
    own = torch.tensor([checksum_of(weight) for weight in weights])
    sums = {ranks: ranks.sum(own) for ranks in distinct(weight.ranks for weight in weights)}
    with together(world, LOADING, StateError):
        for index, weight in enumerate(weights):
            saved = sum(piece.facts["weight_checksum"] for piece in whole[weight.name])
            now = int((own if weight.ranks is None else sums[weight.ranks])[index])
            if (saved - now) % 2**64:
                raise StateError(OTHER_VALUES.format(weight.name))


def _overlap(weight: TrackedWeight, whole: list[Piece]) -> list[Piece]:
    """Return the pieces with rows of this process; where it has none, one without rows."""
    place = place_of(weight)
    first, rows = place["offset"][0], place["shape"][0]
    pieces, offset = [], 0
    for piece in whole:
        start, stop = max(first - offset, 0), min(first + rows - offset, piece.stop)
        if start < stop:
            pieces.append(Piece(piece.source, piece.facts, start, stop))
        offset += piece.stop
    return pieces or [Piece(whole[0].source, whole[0].facts, 0, 0)]


def _tensors_of(name: str, pieces: list[Piece], *, exact: bool) -> dict[str, torch.Tensor]:
    parts = [_read(name, piece, exact=exact) for piece in pieces]
    tensors = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
    if "participation" in tensors:  # that of all rows
        tensors["participation"] = parts[0]["participation"]
    if "mask" in tensors:
        tensors["mask"] = pack(tensors["mask"])
    return tensors


def _read(name: str, piece: Piece, *, exact: bool) -> dict[str, torch.Tensor]:
    """Read a piece, the mask unpacked."""
    kinds, source = piece.facts["tensors"], piece.source
    tensors = {}
    if "total" in kinds:
        tensors["total"] = source.rows(f"{name}.total", piece.start, piece.stop)
    if "moment" in kinds:
        tensors["moment"] = source.rows(f"{name}.moment", piece.start, piece.stop)
    if "participation" in kinds:
        tensors["participation"] = source.rows(f"{name}.participation")
    if "mask" in kinds:
        mask = unpack(source.rows(f"{name}.mask"), torch.Size(piece.facts["shape"]))
        tensors["mask"] = mask[piece.start : piece.stop].clone()
        if "snapshot" in kinds:
            start, stop = piece.start, piece.stop
            if exact:  # of the updated entries only
                start, stop = (int(mask[:row].count_nonzero()) for row in (start, stop))
            tensors["snapshot"] = source.rows(f"{name}.snapshot", start, stop)
    return tensors


def _facts_of(
    weight: TrackedWeight, pieces: list[Piece], tensors: Mapping[str, torch.Tensor], *, exact: bool
) -> dict[str, Any]:
    facts = pieces[0].facts
    changed = any(piece.facts["changed_outside"] for piece in pieces)
    moved = any(piece.facts["frozen_moved"] for piece in pieces)
    checksum = None
    if "mask" in tensors and facts["frozen_checksum"] is not None:
        keep = Mask(weight.weight.shape, tensors["mask"], None).keep
        values = tensors.get("snapshot", weight.weight.detach().cpu())
        checksum = int(frozen_checksum(values, keep))
        changed = changed or ("snapshot" not in tensors and moved)  # no checksum of these rows was kept
    return {
        **facts,
        **place_of(weight),
        "changed_outside": changed,
        "frozen_moved": moved,
        "frozen_checksum": checksum,
        "weight_checksum": checksum_of(weight),
    }
