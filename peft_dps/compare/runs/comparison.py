"""What to compare: methods x tasks x training sizes x seeds, and within which budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_dps.compare.data.tasks import TASKS, Place
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.methods.table import usual_reference
from peft_dps.compare.settings import Settings, require_int

EMBEDDED = "all-MiniLM-L6-v2"
"""Name of the embedded model, which comes from the package index."""

METHODS = (
    "full",
    "full-nodropout",
    "lora",
    "bitfit",
    "houlsby",
    "pfeiffer",
    "dps-dense",
    "dps-dense-nodropout",
    "dps-mix",
    "dps-mix-nodropout",
    "random-mask",
)


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        output: The result file, one JSON line per run.
        methods: The methods.
        tasks: Names of tasks.
        own: The user's own data, each a task.
        probes: What each model is asked before and after training: names, or files of rated pairs or of text.
        model: Path or Hub id of the pretrained model, or `EMBEDDED`.
        train_sizes: Training examples to draw; None for all.
        seeds: One run for each.
        tuning_seeds: With which seeds a learning rate is tried before one is chosen; a number for so many of the
            seeds, from the first on.
        settings: The budget.
        jobs: Runs at the same time, each in a process of its own.
        timing: Whether to measure step times interleaved, before the runs.
        reference: Variant of the method that tables and report test the others against; None for full fine-tuning,
            or the first method if that is not among them.
        imports: Modules that register further methods or tasks.
        place: Where tasks find their data.
    """

    output: Path
    methods: Sequence[Choice] = tuple(map(Choice, METHODS))
    tasks: Sequence[str] = ()
    own: Sequence[OwnData] = ()
    probes: Sequence[str] = ()
    model: str = EMBEDDED
    train_sizes: Sequence[int | None] = (None,)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    tuning_seeds: int | Sequence[int] = 1
    settings: Settings = field(default_factory=Settings)
    jobs: int = 1
    timing: bool = True
    reference: str | None = None
    imports: Sequence[str] = ()
    place: Place = field(default_factory=Place)

    @property
    def task_names(self) -> list[str]:
        """All tasks, the user's own included."""
        return [*self.tasks, *(data.title for data in self.own if data.title not in self.tasks)]

    @property
    def tested_against(self) -> str:
        """Variant of the method that the others are tested against."""
        return self.reference or usual_reference([choice.variant for choice in self.methods])

    @property
    def trying(self) -> Sequence[int]:
        """The seeds that learning rates are tried with."""
        return self.seeds[: self.tuning_seeds] if isinstance(self.tuning_seeds, int) else self.tuning_seeds

    def check(self) -> None:
        """Check what needs no data.

        Raises:
            ValueError: A field has a value that cannot work.
        """
        if not self.task_names:
            raise ValueError("`tasks` must name a task, got none: give one, or your own `data`.")
        _require_different("data", [data.title for data in self.own])
        _require_own_names(self.own, self.tasks)
        for name in ("methods", "train_sizes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must name at least one, got none.")
        for name in ("tasks", "train_sizes", "seeds", "probes"):
            _require_different(name, getattr(self, name))
        _require_different("methods", [(choice.method, sorted(choice.options.items())) for choice in self.methods])
        variants = [choice.variant for choice in self.methods]
        if self.reference not in (None, *variants):
            raise ValueError(f"`reference` must be among the methods, {', '.join(variants)}, got {self.reference!r}.")
        self._check_numbers()
        self.settings.check()

    def _check_numbers(self) -> None:
        require_int("jobs", self.jobs, 1)
        is_number = isinstance(self.tuning_seeds, int)
        require_int("tuning_seeds", self.tuning_seeds if is_number else len(self.trying), 1)
        _require_different("tuning_seeds", self.trying)
        for name, seeds in (("seeds", self.seeds), ("tuning_seeds", self.trying)):
            for seed in seeds:
                require_int(name, seed, 0)
        for size in (each for each in self.train_sizes if each is not None):
            require_int("train_sizes", size, 2)


def _require_own_names(own: Sequence[OwnData], tasks: Sequence[str]) -> None:
    for data in own:
        if data.title in TASKS and data.title in tasks:
            raise ValueError(
                f"`data` {data.source!r} must not be called as the task {data.title!r}, which is compared too: rename "
                "the file, or give the data a `name` in a specification."
            )


def _require_different(name: str, values: Sequence[Any]) -> None:
    if twice := [value for value, count in Counter(map(repr, values)).items() if count > 1]:
        raise ValueError(f"`{name}` must all be different, got {', '.join(twice)} more than once.")
