"""The record of one training run, and the file of all of them: one JSON line per run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How every method is trained.

    Attributes:
        model: Path or Hub id of the pretrained model.
        batch_size: Examples a step.
        epochs: Passes over the training examples.
        learning_rate: Peak learning rate of AdamW, after linear warm-up over a tenth of the steps.
        weight_decay: Decoupled weight decay.
        max_length: Longest sequence, in tokens.
        seed: Seed of the classifier's initial weights and of the order of the data.
    """

    model: str
    batch_size: int = 16
    epochs: int = 3
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_length: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What one training gave.

    Attributes:
        method: Name of the method.
        settings: How it was trained.
        scores: Per domain, the figure of merit on its test examples.
        trainable: Number of trainable entries.
        peak_memory: Peak resident memory during training above that before the model was built, in bytes.
        file_size: Size of the saved model or adapter, in bytes.
        seconds: Wall time of the training.
        losses: Training loss of every step.
        stages: DPS stage of every step; empty for other methods.
        selected: Per layer, the fraction of entries selected at the latest selection; empty for other methods.
        status: What DPS said of itself at the end of the last SUBNETWORK stage; empty for other methods.
        frozen_moved: Whether a frozen entry moved in the last SUBNETWORK stage; None for other methods.
        versions: Versions of the packages in use.
    """

    method: str
    settings: Settings
    scores: dict[str, float]
    trainable: int
    peak_memory: int
    file_size: int
    seconds: float
    losses: list[float]
    stages: list[str] = field(default_factory=list)
    selected: dict[str, float] = field(default_factory=dict)
    status: str = ""
    frozen_moved: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)


def append(run: Run, path: Path) -> None:
    """Append a run to the file, as one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run)) + "\n")
