"""The plan of one training run, which tells it from every other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft_dps.compare.methods.choice import variant_of
from peft_dps.compare.settings import Settings

PROTOCOL = 1
"""Goes up whenever runs of the same plan would no longer be comparable with older ones."""


@dataclass(frozen=True)
class Plan:
    """What tells one run from another: two runs with equal plans are the same run.

    Attributes:
        method: Name of the method in the registry.
        options: What the user set otherwise in the method.
        learning_rate: Peak learning rate.
        phase: "tune" tries a learning rate and looks at the validation split only; "test" is what is reported.
        task: Name of the task.
        train_size: Training examples drawn; None for all there are.
        seed: Draws the training examples, the head's initial weights, the order of the data, dropout, and what the
            method draws by itself.
        model: Name, Hub id or path of the pretrained model.
        settings: The budget.
        data: Fingerprint of the examples of all splits.
        protocol: Version of the protocol.
        metrics: Names of the metrics that were asked for; empty for those of the task.
        probes: Per name of a probe, the fingerprint of its data; empty in phase "tune".
    """

    method: str
    learning_rate: float
    task: str
    seed: int
    model: str
    train_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    phase: Literal["tune", "test"] = "test"
    settings: Settings = field(default_factory=Settings)
    data: str = ""
    protocol: int = PROTOCOL
    metrics: Sequence[str] = ()
    probes: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The identity of the run: 16 hex digits of a hash over all fields."""
        fields = asdict(self)
        for name in ("metrics", "probes"):
            if not fields[name]:  # records without the field are those of the same run
                del fields[name]
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def variant(self) -> str:
        """The method with its options, as the command line writes it: what is compared with what."""
        return variant_of(self.method, self.options)
