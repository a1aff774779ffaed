"""A method as the user chose it, and the choice of its learning rate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_dps.compare.methods import PEFT_PREFIX, find_method
from peft_dps.compare.plan import Plan, Settings, variant
from peft_dps.compare.run import Candidate, Run


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
        """Read a choice as the command line writes it: `name`, `name:{"option": value}` or `peft:Class:{...}`.

        Raises:
            ValueError: The part after the colon is no JSON object.
        """
        found = re.fullmatch(rf"((?:{PEFT_PREFIX})?[^:]+)(?::(.*))?", text, re.DOTALL)
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
        """The method with its options, as `Plan.variant` has it."""
        return variant(self.method, self.options)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of a checked choice."""
        return self.learning_rates or ()

    @property
    def is_tuned(self) -> bool:
        """Whether there is more than one learning rate to choose from."""
        return len(self.rates) > 1

    def plan(self, rate: float, task: str, size: int | None, seed: int, model: str, settings: Settings) -> Plan:
        """Return the plan of a run that is reported; its data is still to be told."""
        return Plan(
            method=self.method,
            options=dict(self.options),
            learning_rate=rate,
            task=task,
            train_size=size,
            seed=seed,
            model=model,
            settings=settings,
        )


def choose(rates: Sequence[float], tried: Sequence[Run]) -> list[Candidate]:
    """Choose the learning rate with the best mean score on the validation split; of equals that with the least loss.

    Args:
        rates: The rates.
        tried: Runs of phase "tune", failed ones included. A rate with a failed run is chosen only if all have one.

    Returns:
        All candidates, one of them chosen.
    """
    candidates, losses = [], {}
    for rate in sorted(rates):
        runs = [run for run in tried if run.plan.learning_rate == rate]
        score = sum(run.validation_score for run in runs) / len(runs) if runs else math.nan
        losses[rate] = sum(run.evaluations[-1].loss for run in runs if run.evaluations)
        candidates.append(Candidate(rate, [run.plan.seed for run in runs], score))

    def rank(candidate: Candidate) -> tuple[float, float]:
        loss = losses[candidate.learning_rate]
        score = -math.inf if math.isnan(candidate.score) else candidate.score
        return score, -math.inf if math.isnan(loss) else -loss

    best = max(candidates, key=rank)
    return [replace(candidate, chosen=candidate is best) for candidate in candidates]


def beyond(candidates: Sequence[Candidate]) -> float | None:
    """Return the learning rate to try next: as far beyond the chosen one as the others are apart.

    Args:
        candidates: At least two, one of them chosen.

    Returns:
        The rate; None if the chosen one lies between others, or all trials failed.
    """
    rates = sorted(candidate.learning_rate for candidate in candidates)
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    if math.isnan(chosen.score) or chosen.learning_rate not in (rates[0], rates[-1]):
        return None
    # In 1, 3, 10, 30, ... every second step is the same.
    factor = rates[1] / rates[0] if chosen.learning_rate == rates[-1] else rates[-2] / rates[-1]
    if len(rates) > 2:
        factor = rates[-2] / rates[-3] if chosen.learning_rate == rates[-1] else rates[1] / rates[2]
    return float(f"{chosen.learning_rate * factor:.2g}")
