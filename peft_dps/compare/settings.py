"""The budget that all methods of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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

    def check(self) -> None:
        """Check the values.

        Raises:
            ValueError: One cannot work.
        """
        for name in ("batch_size", "max_length", "validation_size", "evaluations"):
            require_int(name, getattr(self, name), 1)
        if self.test_size is not None:
            require_int("test_size", self.test_size, 1)
        bounds: dict[str, tuple[float, float]] = {"weight_decay": (0, 1), "warmup": (0, 1), "epochs": (1e-9, 1e9)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"`{name}` must be a number in [{low:g}, {high:g}], got {value!r}.")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"`precision` must be 'fp32' or 'bf16', got {self.precision!r}.")
        if self.attention not in (None, "eager", "sdpa"):
            raise ValueError(f"`attention` must be 'eager' or 'sdpa', got {self.attention!r}.")
        if self.warmup == 1:  # to the Trainer that is one step
            raise ValueError("`warmup` must be below 1, got 1.")


def require_int(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless a value is an integer of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
