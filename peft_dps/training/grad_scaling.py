"""Gradient scalers: the factor that they have left in gradients of backward passes, and the steps that they skip."""

from __future__ import annotations

import math
import weakref
from types import FrameType

from torch.amp import GradScaler


class PassScale:
    """Factor that a gradient scaler has left in the gradients that backward passes have shown.

    Most optimizers are not told it: the scaler has divided `grad` by it before their step. And a step that the scaler
    skips calls no hook; its scale and its count of steps in a row tell of it later.
    """

    def __init__(self) -> None:
        self._scaler: weakref.ref[GradScaler] | None = None
        self._next: tuple[tuple[float, int], ...] = ()  # what the scaler may show next, if no step is skipped

    def __getstate__(self) -> dict[str, object]:
        return {"_scaler": None, "_next": ()}

    def read(self, frame: FrameType | None) -> tuple[float | None, bool]:
        """Return the factor, None where no scaler is seen, and whether steps were skipped since the latest one.

        Args:
            frame: That of the optimizer's step.
        """
        scaler = _calling(frame)
        if scaler is None or not scaler.is_enabled():
            return None, False
        state = scaler.state_dict()
        scale, in_a_row = float(state["scale"]), int(state["_growth_tracker"])
        known = None if self._scaler is None else self._scaler()
        if known is not scaler:
            self._scaler = weakref.ref(scaler)
            skipped = in_a_row == 0 and scale < float(getattr(scaler, "_init_scale", scale))
        else:
            skipped = not any(count == in_a_row and math.isclose(value, scale) for value, count in self._next)
        grown = scale * float(state["growth_factor"])
        self._next = ((scale, in_a_row), (scale, in_a_row + 1), (grown, 0))  # the first is another optimizer's
        return scale, skipped


def _calling(frame: FrameType | None) -> GradScaler | None:
    """Find the scaler that calls an optimizer's step, Accelerate's and FSDP1's among them."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "step" and code.co_argcount:
            caller = frame.f_locals.get(code.co_varnames[0])
            if isinstance(caller, GradScaler):
                return caller
        frame = frame.f_back
    return None
