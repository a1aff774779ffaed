"""Phases of a training: what happens in a stretch of steps, and where in it a step lies."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Stage(str, enum.Enum):
    """What the status calls a phase.

    The first two are Stage I and Stage II of DPS (Zhang et al., NeurIPS 2022, arXiv:2211.01642, section 3); in `FULL`
    everything is trained, and nothing is to be selected.
    """

    ACCUMULATE = "accumulate"
    SUBNETWORK = "subnetwork"
    FULL = "full"


@dataclass(frozen=True)
class Phase:
    """What happens in each of a stretch of steps.

    Attributes:
        stage: What the status calls it.
        gathers: Whether evidence is gathered from the gradients.
        masked: Whether a mask holds, which is selected when the phase begins.
        rewinds: Whether the weights become the pretrained ones again when the phase begins, after its selection.
    """

    stage: Stage
    gathers: bool
    masked: bool
    rewinds: bool = False


ACCUMULATE = Phase(Stage.ACCUMULATE, gathers=True, masked=False)
SUBNETWORK = Phase(Stage.SUBNETWORK, gathers=False, masked=True)
REWOUND = Phase(Stage.SUBNETWORK, gathers=False, masked=True, rewinds=True)
FULL = Phase(Stage.FULL, gathers=False, masked=False)


@dataclass(frozen=True)
class Position:
    """Where in a schedule a step lies.

    Attributes:
        number: Number of the phase, counted from 0. With another number another phase begins.
        phase: The phase.
        step: Number of the step in the phase, counted from 1.
        length: Steps of the phase; None where it lasts until training ends.
        cycle: Number of the cycle, counted from 1.
    """

    number: int
    phase: Phase
    step: int
    length: int | None
    cycle: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the step is the last one of its phase."""
        return self.step == self.length
