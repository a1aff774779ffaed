"""The training state of one adapter: what an exact resume needs besides weights, optimizer and random state.

It is the sum of what the objects of the phase hold, and says of which weights and which method.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft_dps.checkpoint.weight_state import SavedWeight, read_weight
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import checksum
from peft_dps.tensors.processes import Ranks, together, world_of
from peft_dps.tensors.saved_state import SavedState
from peft_dps.training.controller import Controller
from peft_dps.training.weight import TargetWeight

FORMAT = 2
_OF_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, AssertionError)
LOADING = "Loading the training state"
OTHER_VALUES = (
    "The values of the weight of {!r} are not those with which the training state was saved. Load the adapter's "
    "weights of the same moment first, then the training state."
)


def state_of(controller: Controller) -> dict[str, Any]:
    """Take down the training state of an adapter; where FSDP2 has cut the weights, that of this process's rows.

    Args:
        controller: What drives the adapter's training.

    Returns:
        `"header"`: plain values, fit for JSON. `"tensors"`: a flat dict, by `"<path of the layer>.<what>"`. They are
        those in use, as in torch's state dicts: copy what has to outlive the next step.
    """
    controller.rewinding.check_finished(controller.clock.step, controller.adapter)
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for weight in controller.existing:
        own = weight.state(ends=controller.clock.phase_is_over)
        held = {**own.tensors, **own.whole}
        tensors.update({f"{weight.name}.{kind}": tensor for kind, tensor in held.items()})
        weights[weight.name] = {
            **place_of(weight),
            "values": values_of(weight),
            "facts": own.facts,
            "rows": {kind: checksum(tensor) for kind, tensor in own.tensors.items()},
            "whole": {kind: checksum(tensor) for kind, tensor in own.whole.items()},
        }
    header = {
        "format": FORMAT,
        "adapter": controller.adapter,
        "settings": controller.recipe.settings,
        "clock": controller.clock.state(set(weights)),
        "weights": weights,
    }
    return {"header": header, "tensors": tensors}


@torch.no_grad()
def load_state(controller: Controller, state: Mapping[str, Any]) -> None:
    """Go on where the training was whose state was taken down. The weights have to be loaded before.

    Everything is checked, on all processes, before anything is changed on any. Where FSDP2 has cut the weights all
    processes have to call it, each with the state of its rows.

    Args:
        controller: What drives the adapter's training.
        state: What `state_of` returned.

    Raises:
        StateError: If the state is not complete, or not that of this adapter, these settings and these weights; or if
            that is so on another process.
    """
    whose, weights = f"adapter {controller.adapter!r}", controller.existing
    world = world_of(weight.ranks for weight in weights)
    with together(world, LOADING, StateError), damage_told(whose):
        header, tensors = state["header"], dict(state["tensors"])
        check_header(controller, header)
        clock = controller.clock.read(SavedState(whose, header, {}).part("clock"), {weight.name for weight in weights})
        parts = []
        for weight in weights:
            with damage_told(repr(weight.name)):
                own = _saved(weight, header["weights"][weight.name], tensors)
                parts.append(read_weight(weight, own, clock))
        if tensors:
            raise StateError(
                f"The training state of {whose} has tensors that nothing needs: {sorted(map(str, tensors))}."
            )
    _check_whole(world, header, parts)
    controller.take_clock(clock)
    for part in parts:
        part.take()


def _saved(weight: TargetWeight, entry: Any, tensors: dict[str, Any]) -> SavedState:
    """Return what was saved of a weight, and take its tensors out; its place, values and tensors are as they were."""
    saved = SavedState(repr(weight.name), entry, {})
    for name, now in place_of(weight).items():
        before = saved.fact(name)
        if before != now:
            raise StateError(
                f"The training state of {weight.name!r} is that of a weight with {name} {before}, and this one "
                f"has {now}. Resume with the same model and dtype, and the same sharding too where it was not "
                "`save_dps_state` that saved."
            )
    if saved.fact("values") != values_of(weight):
        raise StateError(OTHER_VALUES.format(weight.name))
    facts, own = saved.table("facts"), {}
    for kind, expected in {**saved.table("rows"), **saved.table("whole")}.items():
        key = f"{weight.name}.{kind}"
        if not isinstance(tensors.get(key), torch.Tensor):
            raise StateError(f"The training state lacks the tensor {key!r}. It is damaged.")
        own[kind] = tensors.pop(key)
        with damage_told(repr(key)):
            if checksum(own[kind]) != expected:
                raise StateError(f"The tensor {key!r} of the training state is not the one that was saved.")
    saved.finish()
    return SavedState(repr(weight.name), facts, own)


@contextmanager
def damage_told(whose: str) -> Iterator[None]:
    """Turn what a malformed state brings about into an error that says so."""
    try:
        yield
    except _OF_MALFORMED as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"The training state of {whose} is damaged, or is none: {error!r}.") from error


def place_of(weight: TargetWeight) -> dict[str, Any]:
    """Describe which part of which whole the weight is, and of which dtype."""
    own = weight.weight
    offset = [weight.rows[0], *[0] * (own.dim() - 1)]
    whole = list(weight.parameter.shape)
    return {"shape": list(own.shape), "global_shape": whole, "offset": offset, "dtype": str(own.dtype)}


def values_of(weight: TargetWeight) -> int:
    """Return a checksum of the weight's values. Those of all parts add up to that of the whole."""
    own = weight.weight
    return checksum(own, weight.rows[0] * own[:1].numel() if weight.sharding is not None else 0)


def check_header(controller: Controller, header: Mapping[str, Any]) -> None:
    """Check that a state is that of an adapter with these settings and layers."""
    adapter, names = controller.adapter, {weight.name for weight in controller.existing}
    saved = SavedState(f"adapter {adapter!r}", header, {})
    if saved.fact("format") != FORMAT:
        raise StateError(
            f"The training state has format {header['format']!r}, and this version of peft_dps reads format {FORMAT}. "
            "Resume with the version that saved it."
        )
    if saved.fact("adapter") != adapter:
        raise StateError(
            f"The training state is that of adapter {header['adapter']!r}, not of {adapter!r}. Load it into the "
            "adapter of that name (`adapter_name=`)."
        )
    _check_settings(controller, saved.part("settings"))
    entries = set(saved.table("weights"))
    if names != entries:
        missing, unknown = sorted(names - entries), sorted(map(str, entries - names))
        raise StateError(
            f"The training state is that of other layers than adapter {adapter!r} trains: it lacks {missing} and has "
            f"{unknown} besides. Use the same model and the same `target_modules`."
        )
    saved.table("clock")
    if "save" in header:  # where several processes have saved
        saved.fact("save")
    saved.finish()


def _check_settings(controller: Controller, saved: SavedState) -> None:
    for name, now in controller.recipe.settings.items():
        before = saved.fact(name)
        if before != now or isinstance(before, bool) is not isinstance(now, bool):
            raise StateError(
                f"The training of adapter {controller.adapter!r} was begun with `{name}={before!r}`, and its config "
                f"now has {now!r}. Scores and masks would not fit. Resume with `{name}={before!r}`, or begin a new "
                "training from these weights, without the training state."
            )
    saved.finish()


def _check_whole(world: Sequence[Ranks], header: Mapping[str, Any], parts: Sequence[SavedWeight]) -> None:
    """Check that the parts on all processes are of one save, and their masks together as large as was selected."""
    facts = (header.get("save"), sorted(header["clock"].items()), [part.selected for part in parts])
    own = torch.tensor([zlib.crc32(repr(facts).encode()), *(part.kept for part in parts)], device="cpu")
    found = [ranks.gather(own) for ranks in world] or [own.unsqueeze(0)]
    if bool((found[0][:, 0] != own[0]).any()):
        raise StateError(
            f"The processes were given training states of adapter {header['adapter']!r} from different saves. Give "
            "each its own of the same save."
        )
    for part, kept in zip(parts, found[0][:, 1:].sum(0).tolist(), strict=True):
        ranks = part.weight.ranks
        copies = len(found[0]) // (1 if ranks is None else ranks.size)
        if part.frozen is not None and kept != copies * (part.selected or 0):
            raise StateError(
                f"The training state of {part.weight.name!r} is damaged: its mask holds {kept // copies} entries, and "
                f"`selected` is {part.selected}."
            )
