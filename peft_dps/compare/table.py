"""The table of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from peft_dps.compare.demo_run import Run
from peft_dps.compare.methods import METHODS
from peft_dps.compare.task import Task


def results_table(runs: Sequence[Run], ratios: dict[str, float], task: Task) -> Table:
    """Lay out one column per run: quality in domain and out of it, then costs.

    Args:
        runs: The runs.
        ratios: Per method, its step time relative to the first method's.
        task: What they were trained and tested on.
    """
    table = Table(title=f"Trained on {len(task.train)} examples of {task.name}")
    table.add_column("")
    for run in runs:
        table.add_column(METHODS[run.method].title, justify="right")
    for index, name in enumerate(task.tests):
        domain = f"{task.metric}, {name}{' (in domain)' if index == 0 else ''}"
        table.add_row(
            domain, *(_score(run.scores[name], task) for run in runs), end_section=index + 1 == len(task.tests)
        )
    table.add_row("trainable entries", *(f"{run.trainable:,}" for run in runs))
    table.add_row("step time, ratio", *(f"{ratios[run.method]:.2f}" for run in runs))
    table.add_row("peak memory", *(f"{run.peak_memory / 2**20:.0f} MiB" for run in runs))
    table.add_row("file size", *(f"{run.file_size / 2**20:.1f} MiB" for run in runs))
    return table


def _score(score: float, task: Task) -> str:
    return f"{score:.3f}" if task.is_regression else f"{score:.1%}"
