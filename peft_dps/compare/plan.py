"""The plan of one training run, which tells it from every other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

PROTOCOL = 1
"""Goes up whenever runs of the same plan would no longer be comparable with older ones."""


@dataclass(frozen=True)
class Settings:
    """The budget that all methods share.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples a step.
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Fraction of the steps over which the learning rate rises linearly; then it falls linearly to 0.
        max_length: Longest sequence, in tokens.
        validation_size: Examples held out of the training data, at most a fifth of them.
        test_size: Test examples a domain at most, drawn stratified and always the same; None for all.
        evaluations: How often the validation examples are looked at during training, evenly spread.
        precision: "fp32", or "bf16" for mixed precision: weights in fp32, matrix products in bf16.
        attention: "eager" or "sdpa", as transformers knows them; None for what it takes by itself.
    """

    epochs: float = 3
    batch_size: int = 16
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_length: int = 128
    validation_size: int = 500
    test_size: int | None = None
    evaluations: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["eager", "sdpa"] | None = None


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

    @property
    def key(self) -> str:
        """The identity of the run: 16 hex digits of a hash over all fields."""
        fields = asdict(self)
        if not self.metrics:  # records without the field are those of the same run
            del fields["metrics"]
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def variant(self) -> str:
        """The method with its options, as the command line writes it: what is compared with what."""
        return variant(self.method, self.options)


def variant(method: str, options: Mapping[str, Any]) -> str:
    """Return a method with its options as text, equal for equal options.

    Args:
        method: Name of the method.
        options: What is set otherwise than by default.
    """
    return method + (":" + json.dumps(options, sort_keys=True) if options else "")
