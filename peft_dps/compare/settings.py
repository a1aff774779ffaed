"""The budget that all methods of a comparison share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

VALIDATION_SIZE = 500
"""Examples held out at most, where none else is said."""


@dataclass(frozen=True)
class Settings:
    """The budget that all methods share.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples a step.
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Fraction of the steps over which the learning rate rises linearly; then it falls linearly to 0.
        max_length: Longest sequence, in tokens.
        validation_size: Examples held out of the training data to choose learning rates by, at most a fifth of them;
            0 for none. None in a comparison: 500 if a rate is to be chosen, 0 if all are given.
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
    validation_size: int | None = None
    test_size: int | None = None
    evaluations: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["eager", "sdpa"] | None = None

    def check(self) -> None:
        """Check the values.

        Raises:
            ValueError: One cannot work.
        """
        for name in ("batch_size", "max_length", "evaluations"):
            require_int(name, getattr(self, name), 1)
        for name, least in (("validation_size", 0), ("test_size", 1)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), least)
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

    def holding_out(self, tuned: Sequence[str]) -> Settings:
        """Return them with `validation_size` filled in.

        Args:
            tuned: The methods whose learning rate is to be chosen.

        Raises:
            ValueError: There are some, and nothing to choose by.
        """
        if self.validation_size == 0 and tuned:
            raise ValueError(
                f"`validation_size` must be above 0 to choose a learning rate for {', '.join(tuned)}, got 0: hold "
                "examples out, or give each method one rate (`learning_rates`)."
            )
        if self.validation_size is not None:
            return self
        return replace(self, validation_size=VALIDATION_SIZE if tuned else 0)


def require_int(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless a value is an integer of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
