"""The training state of one adapter: what an exact resume needs besides weights, optimizer and random state.

It is the sum of what the objects of the phase hold, and says of which weights and which method.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import checksum
from peft_dps.tensors.shards import Ranks, together, world_of
from peft_dps.tensors.state import SavedState
from peft_dps.training.controller import Controller
from peft_dps.training.resume import read_state
from peft_dps.training.resume import state_of as state_of_weight
from peft_dps.training.weight import TargetWeight

FORMAT = 2
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
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for weight in controller.existing:
        own = state_of_weight(weight, ends=controller.clock.phase_is_over)
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
        "clock": controller.clock.state(),
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
    weights = controller.existing
    world = world_of(weight.ranks for weight in weights)
    with together(world, LOADING, StateError), damage_told(controller.adapter):
        header, tensors = state["header"], dict(state["tensors"])
        check_header(controller, header)
        saved = SavedState(f"adapter {controller.adapter!r}", header["clock"], {})
        clock = controller.clock.read(saved, {weight.name for weight in weights})
        phase = clock.entered_phase
        takes: list[Callable[[], None]] = []
        for weight in weights:
            own = _saved(weight, header["weights"][weight.name], tensors)
            takes.append(read_state(weight, own, clock.entered or 0, masked=phase is not None and phase.masked))
        if tensors:
            raise saved.damaged(f"it has tensors that nothing needs: {sorted(map(str, tensors))}")
    for ranks in world:
        _check_same_save(ranks, header)
    controller.take_clock(clock)
    for take in takes:
        take()


def _saved(weight: TargetWeight, facts: Mapping[str, Any], tensors: dict[str, Any]) -> SavedState:
    """Return what was saved of one weight, and take its tensors out; its place, values and tensors are as they were."""
    for name, now in place_of(weight).items():
        if facts[name] != now:
            raise StateError(
                f"The training state of {weight.name!r} is that of a weight with {name} {facts[name]}, and this one "
                f"has {now}. Resume with the same model and dtype, and the same sharding too where it was not "
                "`save_dps_state` that saved."
            )
    if facts["values"] != values_of(weight):
        raise StateError(OTHER_VALUES.format(weight.name))
    own = {}
    for kind, expected in {**facts["rows"], **facts["whole"]}.items():
        key = f"{weight.name}.{kind}"
        if not isinstance(tensors.get(key), torch.Tensor):
            raise StateError(f"The training state lacks the tensor {key!r}. It is damaged.")
        own[kind] = tensors.pop(key)
        if checksum(own[kind]) != expected:
            raise StateError(f"The tensor {key!r} of the training state is not the one that was saved. It is damaged.")
    return SavedState(repr(weight.name), facts["facts"], own)


@contextmanager
def damage_told(adapter: str) -> Iterator[None]:
    """Turn what a malformed state brings about into an error that says so.

    Args:
        adapter: Name of the adapter.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"The training state for adapter {adapter!r} is damaged, or is none: {error!r}.") from error


def place_of(weight: TargetWeight) -> dict[str, Any]:
    """Describe which part of which whole the weight is, and of which dtype.

    Args:
        weight: The weight.
    """
    own = weight.weight
    offset = [weight.rows[0], *[0] * (own.dim() - 1)]
    whole = list(weight.parameter.shape)
    return {"shape": list(own.shape), "global_shape": whole, "offset": offset, "dtype": str(own.dtype)}


def values_of(weight: TargetWeight) -> int:
    """Return a checksum of the weight's values. Those of all parts add up to that of the whole.

    Args:
        weight: The weight.
    """
    own = weight.weight
    return checksum(own, weight.rows[0] * own[:1].numel() if weight.sharding is not None else 0)


def check_header(controller: Controller, header: Mapping[str, Any]) -> None:
    """Check that a state is that of an adapter with these settings and layers.

    Args:
        controller: What drives the adapter's training.
        header: Header of the state.

    Raises:
        StateError: If it is not.
    """
    adapter, names = controller.adapter, {weight.name for weight in controller.existing}
    if header["format"] != FORMAT:
        raise StateError(
            f"The training state has format {header['format']!r}, and this version of peft_dps reads format {FORMAT}. "
            "Resume with the version that saved it."
        )
    if header["adapter"] != adapter:
        raise StateError(
            f"The training state is that of adapter {header['adapter']!r}, not of {adapter!r}. Load it into the "
            "adapter of that name (`adapter_name=`)."
        )
    for name, now in controller.recipe.settings.items():
        before = header["settings"].get(name)
        if before != now:
            raise StateError(
                f"The training of adapter {adapter!r} was begun with `{name}={before!r}`, and its config now has "
                f"{now!r}. Scores and masks would not fit. Resume with `{name}={before!r}`, or begin a new training "
                "from these weights, without the training state."
            )
    if names != set(header["weights"]):
        missing, unknown = sorted(names - set(header["weights"])), sorted(set(header["weights"]) - names)
        raise StateError(
            f"The training state is that of other layers than adapter {adapter!r} trains: it lacks {missing} and has "
            f"{unknown} besides. Use the same model and the same `target_modules`."
        )


def _check_same_save(ranks: Ranks, header: Mapping[str, Any]) -> None:
    moment = zlib.crc32(repr((header.get("save"), sorted(header["clock"].items()))).encode())
    if bool((ranks.gather(torch.tensor([moment])) != moment).any()):
        raise StateError(
            f"The processes were given training states of adapter {header['adapter']!r} from different saves. Give "
            "each its own of the same save."
        )
