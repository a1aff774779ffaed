"""The training state of one adapter: what an exact resume needs besides weights, optimizer and random state.

It is kept small: masks in bits, of the snapshot of Mix only what is not in the weight itself, and neither noise, which
is a function of the step, nor the held bits of frozen entries, which are the weight's own.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from peft_dps.masking.bits import unpack
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import frozen_checksum
from peft_dps.masking.mask import Mask
from peft_dps.selection.moments import MomentScores
from peft_dps.selection.schedule import Stage
from peft_dps.tensors.shards import Ranks, together, world_of
from peft_dps.training.controller import Subnetwork
from peft_dps.training.weight import TrackedWeight

logger = logging.getLogger(__name__)

FORMAT = 1
# What makes two trainings the same method. Only the length of the training may change.
SETTINGS = (
    "variant",
    "density",
    "stage_steps",
    "scope",
    "frozen",
    "score",
    "score_dtype",
    "participation_decay",
    "lean",
    "seed",
)
_SETTINGS_BEFORE = {"lean": False, "score_dtype": "float32"}  # of states that were saved before there was the setting
LOADING = "Loading the training state"
OTHER_VALUES = (
    "The values of the weight of {!r} are not those with which the training state was saved. Load the adapter's "
    "weights of the same moment first, then the training state."
)
_STAGES = (None, *(stage.value for stage in Stage))


def state_of(subnetwork: Subnetwork) -> dict[str, Any]:
    """Take down the training state of an adapter; where FSDP2 has cut the weights, that of this process's rows.

    Args:
        subnetwork: The adapter's weights and stages.

    Returns:
        `"header"`: plain values, fit for JSON. `"tensors"`: a flat dict, by `"<path of the layer>.<what>"`:

        - `total`: scores of this ACCUMULATE stage, the weight's shape, in `score_dtype`
        - `moment`: in lean mode, the optimizer's second moment when the stage began, in its dtype
        - `participation`: steps in which each column took part, `[columns]`, fp32, in Mix
        - `mask`: that of this SUBNETWORK stage, row-major, 8 entries a byte, uint8
        - `snapshot`: T of Mix, in the weight's dtype; with `frozen="exact"` flat, and the updated entries only

        The tensors are those in use, as in torch's state dicts: copy what has to outlive the next step.
    """
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for weight in subnetwork.weights:
        if not weight.exists():
            continue
        held = _tensors_of(weight, exact=subnetwork.config.frozen == "exact", stage_is_over=subnetwork.stage_is_over)
        tensors.update({f"{weight.name}.{kind}": tensor for kind, tensor in held.items()})
        weights[weight.name] = {**place_of(weight), **_facts_of(weight), "tensors": sorted(held)}
    config = subnetwork.config
    header = {
        "format": FORMAT,
        "adapter": subnetwork.adapter,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "progress": subnetwork.progress,
        "weights": weights,
    }
    return {"header": header, "tensors": tensors}


@torch.no_grad()
def load_state(subnetwork: Subnetwork, state: Mapping[str, Any]) -> None:
    """Go on where the training was whose state was taken down. The weights have to be loaded before.

    Everything is checked, on all processes, before anything is changed on any. Where FSDP2 has cut the weights all
    processes have to call it, each with the state of its rows.

    Args:
        subnetwork: The adapter's weights and stages.
        state: What `state_of` returned.

    Raises:
        StateError: If the state is not complete, or not that of this adapter, these settings and these weights; or if
            that is so on another process.
    """
    alive = alive_in(subnetwork)
    world = world_of(weight.ranks for weight in alive)
    with together(world, LOADING, StateError), damage_told(subnetwork):
        header, tensors = state["header"], state["tensors"]
        check_header(subnetwork, header)
        progress = _check_progress(subnetwork, header["progress"])
        masks = {
            weight.name: _check_weight(weight, header["weights"][weight.name], header, tensors) for weight in alive
        }
        _check_names(header["weights"], tensors)
    for ranks in world:
        _check_moment(ranks, header)
    subnetwork.resume(progress)
    for weight in alive:
        _fill(subnetwork, weight, header["weights"][weight.name], tensors, masks[weight.name])


def alive_in(subnetwork: Subnetwork) -> list[TrackedWeight]:
    """Return the weights that still exist."""
    return [weight for weight in subnetwork.weights if weight.exists()]


@contextmanager
def damage_told(subnetwork: Subnetwork) -> Iterator[None]:
    """Turn what a malformed state brings about into an error that says so."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"The training state for adapter {subnetwork.adapter!r} is damaged, or is none: {error!r}."
        ) from error


def _tensors_of(weight: TrackedWeight, *, exact: bool, stage_is_over: bool) -> dict[str, torch.Tensor]:
    held = {}
    if weight.total is not None:
        held["total"] = weight.total
    elif weight.moment is not None and stage_is_over:
        held["total"] = weight.take_total()  # who resumes is asked for it before the optimizer makes itself known
    elif weight.moment is not None and (before := weight.moment.before()) is not None:
        held["moment"] = before
    if weight.participation is not None:
        held["participation"] = weight.participation
    if weight.mask is not None:
        held["mask"] = weight.mask.bits
    if weight.mask is not None and weight.snapshot is not None:
        held["snapshot"] = weight.snapshot[weight.mask.keep.bool()] if exact else weight.snapshot
    return held


def place_of(weight: TrackedWeight) -> dict[str, Any]:
    """Describe which part of which whole the weight is, and of which dtype."""
    shape, whole, sharding = list(weight.weight.shape), list(weight.parameter.shape), weight.sharding
    offset = [0 if sharding is None else sharding.first, *[0] * (len(shape) - 1)]
    return {"shape": shape, "global_shape": whole, "offset": offset, "dtype": str(weight.weight.dtype)}


def _facts_of(weight: TrackedWeight) -> dict[str, Any]:
    moved = weight.frozen_moved()
    return {
        "observed": weight.observed,
        "selected": weight.selected,
        # With the policy "gradient" the checksum below tells.
        "changed_outside": weight.changed_outside or (weight.checksum is None and moved),
        "frozen_moved": moved,
        "frozen_checksum": None if weight.checksum is None else int(weight.checksum),
        "weight_checksum": checksum_of(weight),
        "moment": None if weight.moment is None else weight.moment.facts,
    }


def checksum_of(weight: TrackedWeight) -> int:
    """Return a checksum of the bits of the weight's values. Those of all parts add up to that of the whole."""
    nothing_kept = torch.zeros((), dtype=torch.int8, device=weight.weight.device).expand(weight.weight.shape)
    first = 0 if weight.sharding is None else weight.sharding.first * weight.weight[:1].numel()
    return int(frozen_checksum(weight.weight, nothing_kept, first))


def check_header(subnetwork: Subnetwork, header: Mapping[str, Any]) -> None:
    """Check that a state is that of an adapter with these settings and layers.

    Raises:
        StateError: If it is not.
    """
    adapter, names = subnetwork.adapter, {weight.name for weight in alive_in(subnetwork)}
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
    for name in SETTINGS:
        before, now = header["settings"].get(name, _SETTINGS_BEFORE.get(name)), getattr(subnetwork.config, name)
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


def _check_weight(
    weight: TrackedWeight, facts: Mapping[str, Any], header: Mapping[str, Any], tensors: Mapping[str, Any]
) -> torch.Tensor | None:
    """Check what the state has of one weight, and return its mask if there is one."""
    settings = header["settings"]
    missing = {"selected", "observed", "changed_outside", "frozen_checksum", "moment"} - set(facts)
    if header["progress"]["entered"] == Stage.SUBNETWORK.value and settings["density"] < 1.0:
        missing |= {"mask"} - set(facts["tensors"])
    if missing:
        raise StateError(f"The training state lacks {sorted(missing)} of {weight.name!r}. It is damaged.")
    for name, now in place_of(weight).items():
        if facts[name] != now:
            raise StateError(
                f"The training state of {weight.name!r} is that of a weight with {name} {facts[name]}, and this one "
                f"has {now}. Resume with the same model and dtype, and the same sharding too where it was not "
                "`save_dps_state` that saved."
            )
    if facts["weight_checksum"] != checksum_of(weight):
        raise StateError(OTHER_VALUES.format(weight.name))
    parameter = weight.weight
    expected: dict[str, tuple[torch.dtype, list[int]]] = {
        "total": (weight.score_dtype, list(parameter.shape)),
        "participation": (torch.float32, [weight.layer.columns.count]),
        "mask": (torch.uint8, [-(-parameter.numel() // 8)]),
    }
    mask = None
    if "mask" in facts["tensors"]:
        _check_tensor(weight, "mask", tensors, expected["mask"])
        mask = unpack(tensors[f"{weight.name}.mask"].to(parameter.device), parameter.shape)
        updated = [int(mask.count_nonzero())] if settings["frozen"] == "exact" else list(parameter.shape)
        expected["snapshot"] = (parameter.dtype, updated)
    if "moment" in facts["tensors"]:
        expected["moment"] = (tensors[f"{weight.name}.moment"].dtype, list(parameter.shape))
    for kind in facts["tensors"]:
        _check_tensor(weight, kind, tensors, expected[kind])
    return mask


def _check_tensor(
    weight: TrackedWeight, kind: str, tensors: Mapping[str, Any], expected: tuple[torch.dtype, list[int]]
) -> None:
    tensor = tensors.get(f"{weight.name}.{kind}")
    if not isinstance(tensor, torch.Tensor):
        raise StateError(f"The training state lacks the tensor '{weight.name}.{kind}'. It is damaged.")
    found = (tensor.dtype, list(tensor.shape))
    if found != expected:
        raise StateError(
            f"The tensor '{weight.name}.{kind}' of the training state is {found[0]} {found[1]}, and has to be "
            f"{expected[0]} {expected[1]}. It is damaged."
        )


def _check_names(weights: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    expected = {f"{name}.{kind}" for name, facts in weights.items() for kind in facts["tensors"]}
    if set(tensors) != expected:
        raise StateError(f"The training state has tensors that nothing needs: {sorted(set(tensors) - expected)}.")


def _check_progress(subnetwork: Subnetwork, progress: Mapping[str, Any]) -> dict[str, Any]:
    """Check the progress, and enter the number of steps of the training to come."""
    before, now = progress["total_steps"], subnetwork.total_steps
    counts = [progress[name] for name in ("step", "scored_steps", "unscored_steps")]
    stage_steps, names = progress["stage_steps"], {weight.name for weight in subnetwork.weights}
    fits = stage_steps is None or (type(stage_steps) is int and stage_steps > 0)
    fits = fits and progress["entered"] in _STAGES and set(progress["in_round"]) <= names
    if not fits or not all(type(count) is int and count >= 0 for count in counts):
        raise StateError(f"The training state for adapter {subnetwork.adapter!r} is damaged: {progress}.")
    if now is not None and before is not None and before != now:
        logger.warning(
            "Adapter %r: the training was to have %d steps when its state was saved, and now has %d. It goes on from "
            "step %d, with its scores and masks, and its stages stay %s steps long.",
            subnetwork.adapter,
            before,
            now,
            progress["step"],
            progress["stage_steps"],
        )
    return {**progress, "total_steps": before if now is None else now}


def _check_moment(ranks: Ranks, header: Mapping[str, Any]) -> None:
    moment = zlib.crc32(repr((header.get("save"), sorted(header["progress"].items()))).encode())
    if bool((ranks.gather(torch.tensor([moment])) != moment).any()):
        raise StateError(
            f"The processes were given training states of adapter {header['adapter']!r} from different saves. Give "
            "each its own of the same save."
        )


def _fill(
    subnetwork: Subnetwork,
    weight: TrackedWeight,
    facts: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    mask: torch.Tensor | None,
) -> None:
    device = weight.weight.device
    held = {
        kind: tensors[f"{weight.name}.{kind}"].to(device, copy=True) for kind in facts["tensors"] if kind != "mask"
    }
    if mask is not None:
        # Frozen entries are the weight's own, so that what freezing keeps of them can be made anew.
        exact = subnetwork.config.frozen == "exact"
        lean = subnetwork.config.lean
        weight.freeze(Mask.of(mask), facts["selected"])
        weight.keep_frozen(exact=exact, snapshot="snapshot" in held, lean=lean)
        if weight.snapshot is not None and weight.mask is not None and exact:
            weight.snapshot[weight.mask.keep.bool()] = held["snapshot"]
        elif weight.snapshot is not None:
            weight.snapshot = held["snapshot"]
        if weight.checksum is not None:
            weight.checksum.fill_(facts["frozen_checksum"])
    weight.total, weight.participation = held.get("total"), held.get("participation")
    if facts.get("moment") is not None:
        weight.moment = MomentScores(held.get("moment"), **facts["moment"])
    weight.observed, weight.selected = facts["observed"], facts["selected"]
    weight.changed_outside = facts["changed_outside"]
