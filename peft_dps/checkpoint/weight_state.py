"""What an exact resume needs of one weight."""

from __future__ import annotations

from dataclasses import dataclass

from peft_dps.masking.frozen_policy import FrozenWeight, load_frozen
from peft_dps.masking.noise import WeightNoise
from peft_dps.selection.evidence import Gathered
from peft_dps.tensors.saved_state import SavedState
from peft_dps.training.clock import Clock
from peft_dps.training.weight import TargetWeight


@dataclass(frozen=True)
class SavedWeight:
    """What was saved of a weight, read and checked.

    Attributes:
        weight: The weight.
        gathered: Evidence of the phase.
        noise: What noise keeps of it.
        frozen: What the mask that holds keeps of it; None where none holds.
        observed: Steps that brought it a gradient.
        selected: Entries selected at the latest selection.
        phase: Number of the phase.
    """

    weight: TargetWeight
    gathered: Gathered
    noise: WeightNoise
    frozen: FrozenWeight | None
    observed: int
    selected: int | None
    phase: int

    @property
    def kept(self) -> int:
        """Entries that the mask holds here; 0 where none holds."""
        return 0 if self.frozen is None else int(self.frozen.mask.keep.count_nonzero())

    def take(self) -> None:
        """Make it the weight's own. This cannot fail."""
        weight = self.weight
        weight.restart()
        weight.gathered, weight.noise, weight.frozen = self.gathered, self.noise, self.frozen
        weight.observed, weight.selected = self.observed, self.selected
        weight.masked_in = None if self.frozen is None else self.phase


def read_weight(weight: TargetWeight, saved: SavedState, clock: Clock) -> SavedWeight:
    """Read what was saved of a weight, which has the values that it had then."""
    recipe, values = weight.recipe, weight.weight
    observed, selected = saved.number("observed"), saved.number("selected", optional=True)
    if observed > clock.most_steps:
        raise saved.damaged(f"`observed` is {observed} at step {clock.step}")
    if selected is not None and selected > weight.entries:
        raise saved.damaged(f"`selected` is {selected}, of {weight.entries} entries")
    gathered = weight.read_evidence(saved)
    noise = recipe.noise.load(saved, weight.layout, values.device)
    phase, frozen = clock.entered_phase, None
    masked = weight.takes_masks and phase is not None and phase.masked and not recipe.budget.takes_all
    if saved.flag("masked") is not masked:
        raise saved.damaged(f"`masked` is {not masked} at step {clock.step}")
    if masked:
        share = (selected or 0) / weight.entries
        frozen = load_frozen(recipe.frozen, saved, values, share, with_snapshot=recipe.noise.amplifies)
    saved.finish()
    return SavedWeight(weight, gathered, noise, frozen, observed, selected, clock.entered or 0)
