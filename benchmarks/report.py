"""The report of a run: one JSON document, and Markdown tables for the terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.machine import describe_machine, list_versions
from benchmarks.memory import KINDS
from benchmarks.ratio import Ratio, Spread, memory_ratios, seconds, step_ratios
from benchmarks.rounds import FIGURES, Run
from benchmarks.settings import Settings
from benchmarks.variant import VARIANTS

_MIB = 2**20


def to_document(run: Run, settings: Settings, loads: tuple[float, float]) -> dict[str, Any]:
    """Put a run into one JSON-ready document: where, with what, the figures, and all raw numbers.

    Args:
        run: What was measured.
        settings: Settings of the run.
        loads: Load of the machine before and after.
    """
    return {
        "machine": {**describe_machine(), "load_before": loads[0], "load_after": loads[1]},
        "versions": list_versions(),
        "settings": {**asdict(settings), "threads": run.threads},
        "step_ratios": [asdict(ratio) for ratio in step_ratios(run)],
        "memory_ratios": [asdict(ratio) for ratio in memory_ratios(run)],
        "variants": {
            name: {
                "description": VARIANTS[name].description,
                **asdict(summary),
                "peak_above": summary.peak_above,
                "seconds": {
                    figure: asdict(Spread.of(values))
                    for figure in FIGURES
                    if (values := seconds(run, name, figure, lambda times: times.seconds))
                },
            }
            for name, summary in run.summaries.items()
        },
        "rounds": [asdict(each) for each in run.rounds],
    }


def to_tables(run: Run) -> list[Table]:
    """Return the tables of a run: step-time ratios, seconds, memory ratios, and bytes by kind."""
    return [_ratio_table(run), _seconds_table(run), _memory_ratio_table(run), _memory_table(run)]


def _ratio_table(run: Run) -> Table:
    table = _table("step time", "beside", "figure", "median", "quartiles", "own cost", "CPU time", "steps", "target")
    for ratio in step_ratios(run):
        table.add_row(
            ratio.variant,
            ratio.against,
            ratio.figure,
            f"{ratio.step.median:.3f}",
            f"{ratio.step.lower:.3f} to {ratio.step.upper:.3f}",
            f"{ratio.own.median:.3f}",
            f"{ratio.cpu.median:.3f}",
            str(ratio.step.count),
            _verdict(ratio),
        )
    return table


def _verdict(ratio: Ratio) -> str:
    return f"{ratio.target} {'met' if ratio.step.median <= ratio.target else 'missed'}"


def _seconds_table(run: Run) -> Table:
    table = _table("seconds", *(f"{figure}: step, of it the optimizer" for figure in FIGURES))
    for name in run.summaries:
        cells = []
        for figure in FIGURES:
            values = seconds(run, name, figure, lambda times: times.seconds)
            updates = seconds(run, name, figure, lambda times: times.update)
            cells.append(f"{Spread.of(values).median:.3f}, {Spread.of(updates).median:.3f}" if values else "-")
        table.add_row(name, *cells)
    return table


def _memory_ratio_table(run: Run) -> Table:
    table = _table("memory", "beside", "peak", "tensors alone", "target")
    for ratio in memory_ratios(run):
        verdict = f"{ratio.target} {'met' if ratio.peak <= ratio.target else 'missed'}"
        table.add_row(ratio.variant, ratio.against, f"{ratio.peak:.3f}", f"{ratio.tensors:.3f}", verdict)
    return table


def _memory_table(run: Run) -> Table:
    table = _table("MiB", "peak", "stage", *KINDS)
    for name, summary in run.summaries.items():
        for stage, kinds in summary.tensors.items():
            table.add_row(
                name, f"{summary.peak_above / _MIB:.0f}", stage, *(f"{kinds[kind] / _MIB:.0f}" for kind in KINDS)
            )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
