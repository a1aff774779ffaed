"""Evidence from the optimizer's second moment: nothing is added up, and what there is is looked up when needed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from peft_dps.errors import EngineError
from peft_dps.selection.evidence import EVIDENCE, Evidence, Gathered, ObservedWeight
from peft_dps.selection.optimizer_moments import MomentScores, SecondMoment, second_moments, state_of_second_moment
from peft_dps.tensors.saved_state import SavedState, State


class MomentChange(Gathered):
    """What a phase adds to the second moment of one weight.

    Attributes:
        moment: How it is made from the second moment; None before the first step.
        total: It, once the optimizer is not needed any more.
    """

    def __init__(self) -> None:
        self.moment: MomentScores | None = None
        self.total: torch.Tensor | None = None
        self._decay: float | None = None  # of the steps of this phase
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._value: weakref.ref[torch.Tensor] | None = None  # what kept the second moment after the latest step

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_optimizer": None, "_value": None}

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return self.moment is None and self.total is None

    def count(self, now: SecondMoment, name: str, optimizer: Optimizer) -> None:
        """Count a step."""
        if self._optimizer is not None and self._made_from() is not optimizer:
            raise _changed(name, "another optimizer has come")
        self._require_same_state(now, name)
        if self._decay not in (None, now.decay):
            raise _changed(name, f"the optimizer's decay went from {self._decay} to {now.decay}")
        if self.moment is None:
            self.moment = MomentScores(now.value, now.share)
        self.moment.count_step(now.decay)
        self._decay, self._optimizer = now.decay, weakref.ref(optimizer)
        self._keep_track(now.state)

    def after_step(self, weight: ObservedWeight, optimizer: Optimizer) -> None:
        """Take note of the optimizer, and of what it keeps the second moment in."""
        if self.moment is None:
            return
        self._optimizer = self._optimizer or weakref.ref(optimizer)  # it may have come since a state was loaded
        if self._made_from() is optimizer:
            self._keep_track(state_of_second_moment(optimizer, weight.parameter))

    def _keep_track(self, state: torch.Tensor | None) -> None:
        self._value = None if state is None else weakref.ref(state)

    def _require_same_state(self, now: SecondMoment, name: str) -> None:
        if self._value is not None and (now.state is None or self._value() is not now.state):
            raise _changed(name, "the optimizer's state was replaced, as loading one does,")

    def settled(self, weight: ObservedWeight) -> MomentChange:
        """Return the evidence, made now; as it is where there is no optimizer any more to make it from."""
        if self.moment is None or self._made_from() is None:
            return self
        made = MomentChange()
        made.total = self.value(weight)
        return made

    def value(self, weight: ObservedWeight) -> torch.Tensor:
        """Return what the phase has added to the second moment: sum_i beta2^(n - i) * G_i * G_i."""
        if self.total is not None:
            self.total = self.total.to(weight.weight.device)
            return self.total
        if self.moment is None:
            return weight.take_memory(_wide(weight.weight)).zero_()
        optimizer = self._made_from()
        if optimizer is None:
            raise EngineError(
                f"`lean=True` takes the scores of {weight.name!r} from its optimizer, which does not exist any more. "
                "Keep the optimizer until the stage ends, or use `lean=False`."
            )
        now = second_moments(optimizer, {weight.name: weight.parameter})[weight.name]
        self._require_same_state(now, weight.name)
        if now.value is None:
            raise EngineError(
                f"`lean=True` takes scores from the optimizer's second moment, and {type(optimizer).__name__} has "
                f"none of {weight.name!r} after its steps. Use torch.optim.AdamW itself, or `lean=False`."
            )
        return self.moment.scores(now.value, weight.take_memory(_wide(weight.weight)))

    def _made_from(self) -> Optimizer | None:
        return None if self._optimizer is None else self._optimizer()

    def memory(self) -> torch.Tensor | None:
        """Return the memory of the evidence, if it was made."""
        return self.total

    def state(self, weight: ObservedWeight, *, ends: bool) -> State:
        """Return v_0, or the evidence itself where the phase is over."""
        if self.total is not None or (ends and self.moment is not None):
            return State({"moment": None}, {"total": self.value(weight)})
        if self.moment is None:
            return State({"moment": None})
        before = self.moment.before
        facts = {"moment": {**self.moment.facts, "beta2": self._decay}}
        return State(facts, {} if before is None else {"moment": before})


@EVIDENCE.register("second_moment")
class SecondMoments(Evidence):
    """What the optimizer's second moment gains in a phase; see `peft_dps.selection.optimizer_moments`."""

    looks = True

    def begin(self) -> MomentChange:
        """Begin a phase."""
        return MomentChange()

    def dtype_for(self, weight: torch.Tensor) -> torch.dtype:
        """Return fp32, or fp64 for an fp64 weight."""
        return _wide(weight)

    def gather(
        self, weights: Sequence[ObservedWeight], optimizer: Optimizer | None, grad_scale: torch.Tensor | None
    ) -> bool:
        """Count a step; see `Evidence.gather`."""
        if optimizer is None:
            raise EngineError(
                "Evidence from the optimizer's second moment needs optimizer steps, and there are none before "
                "training. Use another `evidence`, or `lean=False`."
            )
        moments = second_moments(optimizer, {weight.name: weight.parameter for weight in weights})
        for weight in weights:
            if isinstance(weight.gathered, MomentChange):
                weight.gathered.count(moments[weight.name], weight.name, optimizer)
        return True

    def load(self, saved: SavedState, weight: torch.Tensor) -> MomentChange:
        """Return what a saved state holds of one weight."""
        gathered = self.begin()
        if "total" in saved:
            gathered.total = saved.amounts("total", weight.shape, _wide(weight)).to(weight.device, copy=True)
        facts = saved.facts("moment")
        if facts is not None:
            before = None
            if "moment" in saved:
                before = saved.amounts("moment", weight.shape, torch.float32, torch.float64)
            gathered.moment = MomentScores(
                before, facts.share("share", positive=True), facts.share("decay"), facts.number("steps", at_least=1)
            )
            gathered._decay = facts.share("beta2")
            if not math.isclose(gathered.moment.decay, gathered._decay**gathered.moment.steps, rel_tol=1e-6):
                raise facts.damaged("`decay` is not what `steps` steps make of `beta2`")
            facts.finish()
        return gathered


def _changed(name: str, what: str) -> EngineError:
    return EngineError(
        f"`lean=True` takes the scores of {name!r} from its optimizer's second moment, and {what} in the middle "
        "of an ACCUMULATE stage. Keep the optimizer as it is, or use `lean=False`. To go on after loading an "
        "optimizer's state, load the training state of the same moment too (`load_dps_state`)."
    )


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
