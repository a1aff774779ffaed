"""A method as the user chose it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_dps.compare.methods.table import PEFT_PREFIX, RECIPE_PREFIX, find_method


@dataclass(frozen=True)
class Choice:
    """A method with its options.

    Attributes:
        method: Name of the method.
        options: What is set otherwise than by default.
        learning_rates: Rates to choose from on the validation split; None for the method's own. One is not chosen
            but taken.
        title: What tables call it; None for the method's own title and the options.
        extends: Whether rates beyond those may be tried. In a checked choice, that is so if none were given.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] | None = None
    title: str | None = None
    extends: bool = False

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read a choice as the command line writes it: `name`, `name:{"option": value}`, `peft:Class:{...}` and so on.

        Raises:
            ValueError: The part after the colon is no JSON object.
        """
        found = re.fullmatch(rf"((?:{PEFT_PREFIX}|{RECIPE_PREFIX})?[^:]+)(?::(.*))?", text, re.DOTALL)
        name, written = (found[1], found[2]) if found else (text, None)
        try:
            options = json.loads(written) if written is not None else {}
        except json.JSONDecodeError as error:
            raise ValueError(
                f"The options of method {name!r} must be a JSON object, got {written!r}: {error}"
            ) from error
        if not isinstance(options, dict):
            raise ValueError(f"The options of method {name!r} must be a JSON object, got {written!r}.")
        return cls(name, options)

    def checked(self) -> Choice:
        """Return it with everything that was left open filled in.

        Raises:
            ValueError: There is no such method, it does not know an option, or a learning rate is none.
        """
        method = find_method(self.method)
        method.check(self.options)
        rates: Sequence[Any] = self.learning_rates or method.learning_rates
        for rate in rates:
            if not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
                raise ValueError(f"`learning_rates` of {self.method!r} must be positive numbers, got {rate!r}.")
        written = ", ".join(f"{name}={value}" for name, value in self.options.items())
        title = self.title or (f"{method.title} ({written})" if written else method.title)
        extends = self.learning_rates is None and len(rates) > 1
        return replace(self, learning_rates=tuple(map(float, rates)), title=title, extends=extends)

    @property
    def variant(self) -> str:
        """The method with its options, as text, equal for equal options."""
        return variant_of(self.method, self.options)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of a checked choice."""
        return self.learning_rates or ()

    @property
    def is_tuned(self) -> bool:
        """Whether there is more than one learning rate to choose from."""
        return len(self.rates) > 1


def variant_of(method: str, options: Mapping[str, Any]) -> str:
    """Return a method with its options as text, equal for equal options.

    Args:
        method: Name of the method.
        options: What is set otherwise than by default.
    """
    return method + (":" + json.dumps(options, sort_keys=True) if options else "")
