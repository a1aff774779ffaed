"""A target weight that an adapter has a whole copy of, and of which masks hold entries."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.errors import EngineError
from peft_dps.masking.frozen_policy import FrozenWeight
from peft_dps.masking.mask import Mask
from peft_dps.selection.scores import ScoreContext
from peft_dps.tensors.layout import Units
from peft_dps.tensors.saved_state import State
from peft_dps.tensors.shards import local_part
from peft_dps.training.rewinding import TrackedBias, rewind
from peft_dps.training.weight import TargetWeight


class CopiedWeight(TargetWeight):
    """A target weight of which an adapter trains a whole copy."""

    @property
    def base_weight(self) -> torch.Tensor:
        """The pretrained weight W0, or this process's rows of it."""
        sharding = self.sharding
        if sharding is None:
            return local_part(self.layer.pretrained_weight())
        known = None if self._sharded_base is None else self._sharded_base()
        if known is not None:
            return local_part(known)
        base = self.layer.pretrained_parameter.data
        return local_part(base) if isinstance(base, DTensor) else sharding.part_of(base).to(self.weight.device)

    def whole_base(self) -> torch.Tensor:
        """Return the whole W0, wherever it lies."""
        base = self.layer.pretrained_parameter.data
        if isinstance(base, DTensor):
            raise EngineError(
                f"Mix computes with the pretrained weight of {self.name!r}, which is sharded apart from the trained "
                "one. Apply `fully_shard` to blocks that hold both, not to base layers."
            )
        return base

    def whole_dtype(self) -> torch.Tensor:
        """Return the trained weight as a forward sees it, for its device and dtype."""
        weight = self.layer.trained(self.adapter)
        return self.parameter if weight is None else weight

    # What the phases keep of it.

    def restart(self) -> None:
        """Forget everything, and begin a new training."""
        self._waiting: Mask | None = None  # selected, and not frozen with yet
        self._bias = TrackedBias()
        super().restart()

    def begin_gathering(self) -> None:
        """Begin a phase that gathers evidence."""
        self.memory.give(self.gathered.memory())
        self.gathered = self.begin_evidence()
        drawn = self.noise.drawn  # for the coming step already
        self.noise = self.recipe.noise.begin()
        self.noise.drawn = drawn
        self.observed = 0

    def thaw(self) -> None:
        """Begin a phase in which no mask holds."""
        if self.frozen is not None:
            self.memory.give(self.frozen.memory())
        self.frozen = self._waiting = None
        self.see_version()

    @property
    def mask(self) -> Mask | None:
        """Which entries are updated; None where no mask holds."""
        return self._waiting if self.frozen is None else self.frozen.mask

    @property
    def choice(self) -> torch.Tensor | None:
        """What tells which entries are updated; see `TargetWeight.choice`."""
        return None if self.frozen is None else self.frozen.mask.keep

    def state(self, *, ends: bool) -> State:
        """Return what an exact resume needs: the sum of what the objects of the phase hold."""
        own = State({"masked": self.frozen is not None}) | super().state(ends=ends) | self.noise.state()
        return own if self.frozen is None else own | self.frozen.state(self.weight)

    def entry_mask(self) -> torch.Tensor | None:
        """Return which entries are updated; see `TargetWeight.entry_mask`."""
        return None if self.frozen is None else self.frozen.mask.keep.bool()

    def score_context(self, generator: torch.Generator, steps: int) -> ScoreContext:
        """Return what a score may look at; see `TargetWeight.score_context`."""
        gathered = self.gathered.value(self)
        if gathered is not None:
            self.noise.relax_(gathered, self, steps)
        return ScoreContext(
            gathered=gathered,
            weight=self.weight.detach(),
            load_base=lambda: self.base_weight,
            generator=generator,
            sharding=self.sharding,
        )

    def unit_sums(self, units: Units, scores: torch.Tensor) -> torch.Tensor:
        """Add up the scores of the entries of each unit; see `TargetWeight.unit_sums`."""
        return units.sums(scores, self.rows[0])

    def choose(self, choice: torch.Tensor, units: Units, phase: int) -> None:
        """Begin a phase in which the chosen units are updated; see `TargetWeight.choose`."""
        mask = units.expand(choice.to(self.weight.device), *self.rows)
        self.freeze(Mask.of(mask), int(choice.count_nonzero()) * units.size, phase)

    def choose_entries(self, mask: Mask, selected: int, phase: int) -> None:
        """Begin a phase in which the chosen entries are updated; see `TargetWeight.choose_entries`."""
        self.freeze(mask, selected, phase)

    def choose_all(self, phase: int) -> None:
        """Begin a phase in which everything is updated; see `TargetWeight.choose_all`."""
        self.drop_evidence()
        self.selected = self.entries

    def has_moved(self) -> bool:
        """Tell whether the weight is another one than the pretrained one."""
        return not torch.equal(self.weight, self.base_weight.to(self.weight))

    def freeze(self, mask: Mask, selected: int, phase: int) -> None:
        """Begin a phase in which a mask holds, and drop the evidence, whose memory serves again.

        If that fails midway, `refreeze` makes up for it.
        """
        self.thaw()
        self._waiting, self.selected, self.masked_in = mask, selected, phase
        self.drop_evidence()
        self.refreeze()

    def refreeze(self) -> None:
        """Let the frozen policy begin anew with the weight as it is, which may have changed since the selection."""
        weight, mask, snapshot = self.weight, self.mask, None
        if mask is None:
            return
        if self.frozen is not None:
            self.memory.give(self._followed(self.frozen).memory())
        if self.recipe.noise.amplifies:
            snapshot = self.take_memory(weight.dtype).copy_(weight.detach())
        memory = self.memory.fitting(weight, weight.dtype)
        self.frozen = self.recipe.frozen(weight, mask, snapshot, memory, (self.selected or 0) / self.entries)
        self._waiting = None
        self.memory.drop()
        self.see_version()

    def rewind(self) -> list[nn.Parameter]:
        """Give the weight, and its bias, their pretrained values, and let the mask hold from there; return both."""
        layer, rewound = self.layer, []
        bias, pretrained = self._bias.find(layer, self.adapter), layer.pretrained_bias()
        if self.parameter.requires_grad:
            rewind(self.parameter, layer.trained(self.adapter), self.base_weight, self.name)
            rewound.append(self.parameter)
        if bias is not None and pretrained is not None and bias.requires_grad:
            rewind(bias, layer.trained_bias(self.adapter), pretrained, self.name)
            rewound.append(bias)
        self.refreeze()
        return rewound

    def see_version(self) -> None:
        """Take note of the weight's version, and of its bias while nothing has collected it."""
        super().see_version()
        if self.recipe.schedule.rewinds and self.exists():
            self._bias.find(self.layer, self.adapter)

    def drop_evidence(self) -> None:
        """Forget what was gathered."""
        self.memory.give(self.gathered.memory())
        self.gathered = self.begin_evidence()
        self.noise = self.recipe.noise.begin()

    def is_at_snapshot(self) -> bool:
        """Tell whether frozen entries have the bits of the snapshot for sure: nothing has touched them since."""
        return self.frozen is not None and self.frozen.holds_bits and self.version == self.parameter._version

    def follow(self) -> None:
        """Let what the mask that holds keeps of the weight follow it to another device."""
        if self.frozen is not None:
            self._followed(self.frozen)

    def count_participation(self) -> None:
        """Count the columns that took part in this step; all of them if the weight was read without noise."""
        columns = self.layout.columns
        if columns is not None:  # a layer in eval mode computes without noise
            self.noise.count_step(columns.count, self.weight.device, noisy=self.layer.training)

    def before_step(self) -> None:
        """Get ready for an optimizer that may change the weight."""
        if self.frozen is not None:
            self._followed(self.frozen).before_step(self.weight)

    def mask_gradient(self) -> None:
        """Apply the frozen policy to the gradient."""
        if self.frozen is not None:
            self._followed(self.frozen).mask_gradient_(self.gradient)

    def after_step(self, optimizer: Optimizer) -> None:
        """Apply the frozen policy to what the optimizer has done."""
        self.gathered.after_step(self, optimizer)
        if self.frozen is not None:
            self._followed(self.frozen).after_step(self.weight)
            self.version = self.parameter._version

    def accept_changes(self) -> bool:
        """Take values that were written from outside since the latest step, such as a loaded state, as they are."""
        if self.frozen is None:
            return False
        changed = self.was_changed()
        self.version = self.parameter._version
        return changed and self._followed(self.frozen).accept(self.weight)

    def frozen_moved(self) -> bool:
        """Tell whether any frozen entry has other bits than when the mask began to hold."""
        frozen = self.frozen
        return frozen is not None and self._followed(frozen).moved(self.weight)

    def _followed(self, frozen: FrozenWeight) -> FrozenWeight:
        frozen.follow(self.weight, self.name)
        return frozen
