"""The demo: a comparison on a small pretrained model that takes some minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft_dps.compare.choice import Choice
from peft_dps.compare.comparison import EMBEDDED, Comparison
from peft_dps.compare.own import OwnData
from peft_dps.compare.plan import Settings
from peft_dps.compare.tasks import Place

# One rate each, from the middle of the method's grid: choosing would take longer than all the rest. The best entries
# are sought over the whole model, so that the report can show which layers they fall on.
METHODS = (
    Choice("full", learning_rates=(1e-4,)),
    Choice("lora", learning_rates=(1e-3,)),
    Choice("bitfit", learning_rates=(3e-3,)),
    Choice("dps-dense", {"scope": "model"}, (1e-4,), "DPS Dense"),
    Choice("dps-mix", {"scope": "model"}, (1e-4,), "DPS Mix"),
)
TRAIN_SIZE = 600


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        output: Folder for the results and the report.
        model: Path or Hub id of a model; None for the embedded one.
        data: The user's own data; None for the embedded corpora.
        train_size: Training examples; None for all of `data`, or 600 of the embedded corpora.
        test_size: Test examples per domain at most.
        epochs: Passes over the training examples.
        learning_rate: Peak learning rate of all methods; None for each method's own.
        seed: Seed of everything that is drawn.
        cache: Folder for the embedded assets; None for the user's cache folder.
    """

    output: Path
    model: str | None = None
    data: OwnData | None = None
    train_size: int | None = None
    test_size: int = 500
    epochs: float = 3
    learning_rate: float | None = None
    seed: int = 0
    cache: Path | None = None

    @property
    def fetches(self) -> bool:
        """Whether the embedded model or corpora are needed."""
        return self.model is None or self.data is None

    def comparison(self) -> Comparison:
        """Return the comparison that the demo is."""
        rate = self.learning_rate
        methods = METHODS if rate is None else [Choice(m.method, m.options, (rate,), m.title) for m in METHODS]
        size = self.train_size if self.data or self.train_size else TRAIN_SIZE
        return Comparison(
            output=self.output / "runs.jsonl",
            methods=methods,
            tasks=() if self.data else ("sentiment",),
            own=(self.data,) if self.data else (),
            model=self.model or EMBEDDED,
            train_sizes=(size,),
            seeds=(self.seed,),
            settings=Settings(
                epochs=self.epochs, max_length=64, validation_size=100, test_size=self.test_size, evaluations=5
            ),
            place=Place(cache=self.cache),
        )
