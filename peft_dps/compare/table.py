"""The table of a comparison in the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from peft_dps.compare.costs import step_ratios
from peft_dps.compare.results import Results
from peft_dps.compare.run import Run


def show(results: Results, console: Console) -> None:
    """Show a table for each task and training size, and the proof that DPS engaged.

    Args:
        results: The records.
        console: Where to show them.
    """
    groups: dict[tuple[str, int | None], list[Run]] = {}
    for run in results.reported:
        groups.setdefault((run.plan.task, run.plan.train_size), []).append(run)
    for (task, _), runs in groups.items():
        timing = next((timing for timing in reversed(results.timings) if timing.task == task), None)
        console.print(results_table(runs, step_ratios(timing) if timing else {}))
    shown: set[str] = set()
    for run in results.reported:
        if run.status and run.plan.variant not in shown:
            shown.add(run.plan.variant)
            console.print(f"Proof that {run.title} engaged, at the end of its last SUBNETWORK: {run.status}.")


def results_table(runs: Sequence[Run], ratios: Mapping[str, float]) -> Table:
    """Lay out one column per method: quality in domain and out of it, then costs.

    Args:
        runs: Runs of one task and training size; the seeds of a method are averaged, and failed runs are counted.
        ratios: Per variant, its step time relative to the reference.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.plan.variant, []).append(run)
    seeds = max(len(group) for group in groups.values())
    table = Table(title=_title(runs) + (f", mean of {seeds} seeds ± standard deviation" if seeds > 1 else ""))
    table.add_column("")
    for group in groups.values():
        table.add_column(group[0].title, justify="right")
    whole = [[run for run in group if not run.failed] for group in groups.values()]
    first = next((run for group in whole for run in group), None)
    if first is not None:
        for index, domain in enumerate(first.scores):
            name = f"{_metric(first)}, {domain}{' (in domain)' if index == 0 else ''}"
            table.add_row(
                name, *(_scores(group, domain) for group in whole), end_section=index + 1 == len(first.scores)
            )
    if any(run.failed for run in runs):
        table.add_row("failed runs", *(str(sum(run.failed for run in group)) for group in groups.values()))
    table.add_row("learning rate", *(_rates(group) for group in groups.values()))
    table.add_row("trainable entries", *(f"{group[0].trainable:,}" if group else "-" for group in whole))
    if ratios:
        table.add_row("step time, ratio", *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in groups))
    table.add_row("peak memory", *(_mebibytes(group, "peak_memory", 0) for group in whole))
    table.add_row("file size", *(_mebibytes(group, "file_size", 1) for group in whole))
    return table


def _title(runs: Sequence[Run]) -> str:
    plan, sizes = runs[0].plan, {run.examples["train"] for run in runs if "train" in run.examples}
    return f"{plan.task}, trained on {max(sizes, default=0):,} examples"


def _metric(run: Run) -> str:
    return "/".join(run.metrics)


def _scores(group: Sequence[Run], domain: str) -> str:
    scores = [100 * run.score(domain) for run in group]
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def _rates(group: Sequence[Run]) -> str:
    return ", ".join(sorted({f"{run.plan.learning_rate:g}" for run in group}))


def _mebibytes(group: Sequence[Run], name: str, digits: int) -> str:
    return f"{statistics.median(getattr(run, name) for run in group) / 2**20:.{digits}f} MiB" if group else "-"
