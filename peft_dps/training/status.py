"""What DPS is doing right now: the proof that it engaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_dps.selection.phase import Stage
from peft_dps.training.controller import Controller


@dataclass(frozen=True)
class LayerStatus:
    """State of one layer's weight.

    Attributes:
        entries: Number of entries of the weight.
        selected: Entries selected at the latest selection, or those of a compact adapter that was loaded; None before
            the first.
        observed: Steps of this ACCUMULATE stage (or of the one before this SUBNETWORK stage) that brought a gradient.
        frozen_moved: Whether a frozen entry has other bits than when this SUBNETWORK stage began.
    """

    entries: int
    selected: int | None
    observed: int
    frozen_moved: bool


@dataclass(frozen=True)
class DPSStatus:
    """State of one adapter's training.

    Attributes:
        adapter: Name of the adapter.
        steps: Applied optimizer steps that DPS has seen; 0 means that it has not engaged.
        cycle: Number of the current cycle, from 1; None before the first step.
        stage: Current stage; None before the first step.
        step_in_stage: Number of the latest step within its stage, from 1; None before the first step.
        stage_steps: Length of the current stage in steps; None before the first step, and where it lasts to the end.
        total_steps: Steps of the whole training, if known.
        unscored_steps: Steps whose gradients were not finite: counted, but not scored.
        layers: Per path of a layer, its state.
    """

    adapter: str
    steps: int
    cycle: int | None
    stage: Stage | None
    step_in_stage: int | None
    stage_steps: int | None
    total_steps: int | None
    unscored_steps: int
    layers: dict[str, LayerStatus]

    @property
    def entries(self) -> int:
        """Number of entries of all targeted weights."""
        return sum(layer.entries for layer in self.layers.values())

    @property
    def selected(self) -> int | None:
        """Entries selected at the latest selection; None before the first."""
        counts = [layer.selected for layer in self.layers.values() if layer.selected is not None]
        return sum(counts) if counts else None

    @property
    def selected_fraction(self) -> float | None:
        """Fraction of all entries selected at the latest selection; None before the first."""
        return _fraction((layer.selected, layer.entries) for layer in self.layers.values())

    @property
    def frozen_moved(self) -> bool:
        """Whether any frozen entry has moved since this SUBNETWORK stage began."""
        return any(layer.frozen_moved for layer in self.layers.values())

    @property
    def engaged(self) -> bool:
        """Whether a subnetwork has been selected at least once."""
        return self.selected is not None

    def __str__(self) -> str:
        if self.stage is None:
            trains = f"{self.entries} entries targeted"
            if self.selected is not None:
                trains = f"selected {self.selected} of {self.entries} entries"
            return f"DPS adapter {self.adapter!r}: no optimizer step seen yet, {trains}"
        selected = "none yet" if self.selected_fraction is None else f"{self.selected_fraction:.1%}"
        if self.stage is Stage.SUBNETWORK:
            moved = "moved" if self.frozen_moved else "unmoved"
            doing = f"selected {selected} of {self.entries} entries, frozen entries {moved}"
        elif self.stage is Stage.FULL:
            doing = f"training all of {self.entries} entries"
        else:
            doing = f"scoring {self.entries} entries, last selected {selected}"
        of_stage = "" if self.stage_steps is None else f"/{self.stage_steps}"
        return (
            f"DPS adapter {self.adapter!r}: step {self.steps}, cycle {self.cycle}, {self.stage.value} "
            f"{self.step_in_stage}{of_stage}, {doing}, {self.unscored_steps} steps not scored"
        )


def selected_fraction_of(controller: Controller) -> float | None:
    """Return the fraction of all entries selected at the latest selection, without reading any weight."""
    return _fraction((weight.selected_now, weight.entries) for weight in controller.existing)


def _fraction(counts: Iterable[tuple[int | None, int]]) -> float | None:
    pairs = list(counts)
    selected = [count for count, _ in pairs if count is not None]
    return sum(selected) / sum(entries for _, entries in pairs) if selected else None


def status_of(controller: Controller) -> DPSStatus:
    """Read the state of one adapter's training."""
    clock = controller.clock
    position = clock.position
    return DPSStatus(
        adapter=controller.adapter,
        steps=clock.step,
        cycle=None if position is None else position.cycle,
        stage=None if position is None else position.phase.stage,
        step_in_stage=None if position is None else position.step,
        stage_steps=None if position is None else position.length,
        total_steps=clock.total_steps,
        unscored_steps=clock.unscored_steps,
        layers={
            weight.name: LayerStatus(
                entries=weight.entries,
                selected=weight.selected_now,
                observed=weight.observed,
                frozen_moved=weight.frozen_moved(),
            )
            for weight in controller.existing
        },
    )
