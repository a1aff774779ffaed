"""What an exact resume needs of one weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

from peft_dps.masking.frozen import load_frozen
from peft_dps.tensors.state import SavedState, State
from peft_dps.training.weight import TargetWeight


def settled(weight: TargetWeight) -> TargetWeight:
    """Return a copy, of the same layer and tensors, that needs no optimizer any more to be selected from.

    Args:
        weight: The weight, at the end of a phase that gathers evidence.
    """
    alone = copy.copy(weight)
    alone.gathered = weight.gathered.settled(alone)
    return alone


def state_of(weight: TargetWeight, *, ends: bool) -> State:
    """Return what the phase keeps of a weight: the sum of what its objects hold.

    Args:
        weight: The weight.
        ends: Whether the phase is over.
    """
    own = State({"observed": weight.observed, "selected": weight.selected, "masked": weight.frozen is not None})
    own = own | weight.gathered.state(weight, ends=ends) | weight.noise.state()
    return own if weight.frozen is None else own | weight.frozen.state(weight.weight)


def read_state(weight: TargetWeight, saved: SavedState, phase: int, *, masked: bool) -> Callable[[], None]:
    """Check what was saved of a weight, which has the values that it had then.

    Args:
        weight: The weight.
        saved: What `state_of` returned.
        phase: Number of the phase.
        masked: Whether a mask holds in it.

    Returns:
        What makes it the weight's own, and cannot fail.

    Raises:
        StateError: If it is incomplete or makes no sense.
    """
    recipe, values = weight.recipe, weight.weight
    observed, selected = saved.number("observed"), saved.number("selected", optional=True)
    if selected is not None and selected > weight.entries:
        raise saved.damaged(f"`selected` is {selected} of {weight.entries} entries")
    gathered = recipe.evidence.load(saved, values)
    noise = recipe.noise.load(saved, weight.layout, values.device)
    has_mask, frozen = saved.flag("masked"), None
    if has_mask != (masked and not recipe.budget.takes_all):
        raise saved.damaged("it has a mask in a phase without one, or none in a phase with one")
    if has_mask:
        frozen = load_frozen(recipe.frozen, saved, values, with_snapshot=recipe.noise.substitutes)
        if weight.sharding is None and int(frozen.mask.keep.count_nonzero()) != selected:
            raise saved.damaged(f"its mask does not hold as many entries as `selected` says, {selected}")
    saved.finish()

    def take() -> None:
        weight.restart()
        weight.gathered, weight.noise, weight.frozen = gathered, noise, frozen
        weight.observed, weight.selected = observed, selected
        weight.masked_in = phase if has_mask else None

    return take
