"""One target weight of an adapter: where it is now, and what the current phase keeps of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peft_dps.errors import EngineError
from peft_dps.masking.frozen_policy import FrozenWeight
from peft_dps.masking.mask import Mask
from peft_dps.masking.noise import WeightNoise
from peft_dps.selection.evidence import Gathered
from peft_dps.selection.scores import ScoreContext
from peft_dps.tensors.layout import Layout, Units
from peft_dps.tensors.processes import Ranks
from peft_dps.tensors.saved_state import SavedState, State
from peft_dps.tensors.shards import Sharding, local_part, sharding_of
from peft_dps.tensors.spare_memory import SpareMemory
from peft_dps.training.layer import TargetLayer, Training
from peft_dps.training.recipe import Recipe

_REFERENCES = ("_layer", "_owner")
UNKNOWN = -1  # version counter of a weight that was copied or unpickled


class TargetWeight:
    """One target weight of an adapter. It is looked up anew each time, since engines replace parameters.

    Where FSDP2 has cut the weight over processes, everything here is this process's part of it.

    Args:
        name: Path of its layer in the base model.
        layer: The layer.
        adapter: Name of the adapter.
        owner: The training that it belongs to.
        recipe: The method.

    Attributes:
        memory: What a phase leaves to the next.
        gathered: Evidence of this phase.
        noise: What noise keeps of it in this phase.
        frozen: What the mask that holds keeps of it; None where none holds.
        masked_in: Number of the phase that the latest mask was selected for.
        observed: Steps of this phase, or the latest that gathered evidence, that brought it a gradient.
        selected: Entries selected at the latest selection; None before the first.
        version: Version counter of the weight when nothing but the optimizer was to change it any more.
        takes_masks: Whether masks hold entries of it in a phase of a selection.
    """

    takes_masks: ClassVar[bool] = True

    def __init__(self, name: str, layer: TargetLayer, adapter: str, owner: Training, recipe: Recipe) -> None:
        self.name = name
        self.adapter = adapter
        self.recipe = recipe
        # The layer owns the training; a cycle would keep dead models in memory.
        self._layer: Callable[[], TargetLayer | None] = weakref.ref(layer)
        self._owner: Callable[[], Training | None] = weakref.ref(owner)
        self._sharded: weakref.ref[nn.Parameter] | None = None
        self._sharded_base: weakref.ref[torch.Tensor] | None = None
        self._sharding: Sharding | None = None
        self.memory = SpareMemory()
        self.restart()

    def __getstate__(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("_sharded", "_sharded_base", "_sharding"))
        known = {"memory": SpareMemory(), "version": UNKNOWN}
        return {**self.__dict__, **unknown, **known, "_layer": self._layer(), "_owner": self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        references = {name: _nothing if state[name] is None else weakref.ref(state[name]) for name in _REFERENCES}
        self.__dict__.update(state, **references)

    # Where it is.

    def exists(self) -> bool:
        """Tell whether the layer still exists and has the adapter, which may have been deleted, and added anew."""
        layer = self._layer()
        if layer is None or layer.trained(self.adapter) is None:
            return False
        return layer.training_of(self.adapter) is self._owner()

    @property
    def layer(self) -> TargetLayer:
        """The layer that holds the weight."""
        layer = self._layer()
        if layer is None:
            raise EngineError(
                f"The layer {self.name!r} of adapter {self.adapter!r} does not exist any more. Train with an "
                "optimizer over the parameters that the model has now."
            )
        return layer

    @property
    def layout(self) -> Layout:
        """Where its rows and columns are."""
        return self.layer.layout

    @property
    def parameter(self) -> nn.Parameter:
        """The trained weight as optimizers hold it: with FSDP2 a DTensor, also while a forward has it as a whole."""
        parameter = self.layer.trained(self.adapter)
        if parameter is None:
            raise EngineError(f"The layer {self.name!r} has no adapter {self.adapter!r} any more.")
        known = None if self._sharded is None else self._sharded()
        if not isinstance(parameter, DTensor):
            return parameter if known is None else known
        if known is not parameter:
            if parameter.numel() == 0:
                raise EngineError(
                    f"FSDP2 has cut the trained weight of {self.name!r}, which has no units: torch cannot put it "
                    "together. Pass `ignored_params=peft_dps.unsharded_parameters(model)` to each `fully_shard`."
                )
            self._sharding = None
            self._sharded, self.version = weakref.ref(parameter), UNKNOWN
            base = self.layer.pretrained_parameter
            self._sharded_base = weakref.ref(base) if isinstance(base, DTensor) else None
        return parameter

    @property
    def sharding(self) -> Sharding | None:
        """How the weight is cut over processes; None if it is whole."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return None
        if self._sharding is None:
            if self._sharded_base is not None and self.layer.is_offloaded:
                raise EngineError(
                    f"FSDP2 has cut the pretrained weight of {self.name!r}, which `offload_base` was to keep in a "
                    "file. Pass `ignored_params=peft_dps.unsharded_parameters(model)` to each `fully_shard`, or leave "
                    "`offload_base` out."
                )
            self._sharding = sharding_of(parameter, self.name)
        return self._sharding

    @property
    def ranks(self) -> Ranks | None:
        """The processes that the weight is cut over; None if it is whole."""
        sharding = self.sharding
        return None if sharding is None else sharding.ranks

    @property
    def score_ranks(self) -> Ranks | None:
        """The processes over which its scores are cut; None if each has all of them."""
        return self.ranks

    @property
    def rows(self) -> tuple[int, int]:
        """The first of the rows that are here, and their number."""
        sharding = self.sharding
        return (0, self.parameter.shape[0]) if sharding is None else (sharding.first, sharding.rows)

    @property
    def weight(self) -> torch.Tensor:
        """The trained weight, or this process's rows of it."""
        return local_part(self.parameter)

    @property
    def entries(self) -> int:
        """Number of entries of the whole weight."""
        return self.parameter.numel()

    @property
    def selected_now(self) -> int | None:
        """Entries that are selected, also where an earlier training has selected them; None if none have been."""
        return self.selected

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient that the optimizer is about to apply, or this process's rows of it."""
        gradient = self.parameter.grad
        if gradient is None:
            raise EngineError(
                f"The weight of {self.name!r} lost its gradient during the optimizer step. Leave gradients alone in "
                "other step hooks, or register those before importing peft_dps."
            )
        if gradient.layout is not torch.strided:
            raise EngineError(
                f"The gradient of {self.name!r} has layout {gradient.layout}; DPS needs dense gradients. Create the "
                "module with `sparse=False`."
            )
        return local_part(gradient)

    @property
    def has_gradient(self) -> bool:
        """Whether the coming optimizer step has a gradient of it."""
        return self.parameter.grad is not None

    @property
    def is_trained(self) -> bool:
        """Whether it is to be trained: nobody has frozen it by hand."""
        return self.parameter.requires_grad

    # What the phases keep of it. A storage of its own has a subclass that says what it does about it.

    @property
    def choice(self) -> torch.Tensor | None:
        """What tells which entries are updated, on every process alike; None where all or none are."""
        return None

    def entry_mask(self) -> torch.Tensor | None:
        """Return which entries are updated, a bool tensor of the weight's shape; None where no mask holds."""
        return None

    def restart(self) -> None:
        """Forget everything, and begin a new training."""
        self.selected: int | None = None
        self.masked_in: int | None = None
        self.gathered: Gathered = self.begin_evidence()
        self.noise: WeightNoise = self.recipe.noise.begin()
        self.frozen: FrozenWeight | None = None
        self.observed = 0
        self.memory.drop()
        self.see_version()

    def begin_evidence(self) -> Gathered:
        """Return evidence of which nothing has been gathered yet."""
        return self.recipe.evidence.begin()

    def settled(self) -> TargetWeight:
        """Return a copy, of the same layer and tensors, that needs no optimizer any more to be selected from."""
        alone = copy.copy(self)
        alone.gathered = self.gathered.settled(alone)
        return alone

    def begin_gathering(self) -> None:
        """Begin a phase that gathers evidence."""
        self.gathered = self.begin_evidence()
        self.observed = 0

    def thaw(self) -> None:
        """Begin a phase in which no mask holds."""
        self.see_version()

    def state(self, *, ends: bool) -> State:
        """Return what an exact resume needs; `ends` tells whether the latest step was the last of its phase."""
        return State({"observed": self.observed, "selected": self.selected}) | self.gathered.state(self, ends=ends)

    def read_evidence(self, saved: SavedState) -> Gathered:
        """Return the evidence that a saved state holds."""
        return self.recipe.evidence.load(saved, self.weight)

    @property
    def mask(self) -> Mask | None:
        """Which entries are updated; None where no mask holds."""
        return None

    def score_context(self, generator: torch.Generator, steps: int) -> ScoreContext:
        """Return what a score may look at, after so many steps of gathering; relaxes the evidence in place."""
        raise NotImplementedError

    def limited(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of units, 0 for those that the adapter has no room for."""
        return scores

    def unit_sums(self, units: Units, scores: torch.Tensor) -> torch.Tensor:
        """Add up the scores of the entries of each unit that are here, `[units]`, fp64."""
        raise NotImplementedError

    def choose(self, choice: torch.Tensor, units: Units, phase: int) -> None:
        """Begin a phase in which the chosen units are updated, and drop the evidence.

        Args:
            choice: Bool, `[units]`.
            units: How they lie in the weight.
            phase: Number of the phase.
        """
        raise NotImplementedError

    def choose_entries(self, mask: Mask, selected: int, phase: int) -> None:
        """Begin a phase in which the chosen entries are updated, and drop the evidence.

        Args:
            mask: They, of the weight or of this process's rows of it.
            selected: Number of chosen entries of the whole weight.
            phase: Number of the phase.
        """
        raise NotImplementedError

    def choose_all(self, phase: int) -> None:
        """Begin a phase in which everything is updated, and drop the evidence."""
        raise NotImplementedError

    def refreeze(self) -> None:
        """Let the frozen policy begin anew with the weight as it is, which may have changed since the selection."""

    def rewind(self) -> list[nn.Parameter]:
        """Give what is trained its pretrained values, and return those parameters."""
        raise NotImplementedError

    def drop_evidence(self) -> None:
        """Forget what was gathered."""
        self.gathered = self.begin_evidence()

    def take_memory(self, dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the weight's shape: that of the phase before, if it fits."""
        return self.memory.take(self.weight, dtype)

    def see_version(self) -> None:
        """Take note of the weight's version: up to now any change was fine."""
        self.version = self.parameter._version if self.exists() else UNKNOWN

    def was_changed(self) -> bool:
        """Tell whether something but the optimizer has changed the weight since its version was seen."""
        return self.version not in (UNKNOWN, self.parameter._version)

    def count_participation(self) -> None:
        """Count the columns that took part in this step; all of them if the weight was read without noise."""

    def before_step(self) -> None:
        """Get ready for an optimizer that may change the weight."""

    def mask_gradient(self) -> None:
        """Apply the frozen policy to the gradient."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Apply the frozen policy to what the optimizer has done."""

    def accept_changes(self) -> bool:
        """Take values that were written from outside since the latest step, such as a loaded state, as they are."""
        return False

    def frozen_moved(self) -> bool:
        """Tell whether any frozen entry has other bits than when the mask began to hold."""
        return False

    def has_moved(self) -> bool:
        """Tell whether the weight is another one than the pretrained one."""
        raise NotImplementedError


def _nothing() -> None:
    """Stand in for the reference to something that is gone."""
