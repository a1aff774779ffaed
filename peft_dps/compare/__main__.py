"""The command line: `python -m peft_dps.compare demo`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from peft_dps.compare.assets import AssetError
from peft_dps.compare.corpora import DataError
from peft_dps.compare.demo import Demo, run_demo
from peft_dps.errors import DPSError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments; None for the process's own.

    Returns:
        The exit status: 0, or 1 after an error that was named on the terminal.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        run_demo(_demo(options), console)
    except (AssetError, DataError, DPSError, ValueError, OSError) as error:
        console.print(f"Error: {error}", style="red", markup=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dps", description="Compare fine-tuning methods side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="full fine-tuning, DPS Dense and DPS Mix on a small model",
        description="Fine-tune with full fine-tuning, DPS Dense and DPS Mix, then show one table and draw one figure.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", help="path or Hub id of a model (default: a 22M one from the package index)")
    demo.add_argument("--data", help="Hub id, or csv, tsv, json, jsonl or parquet file (default: movie reviews)")
    demo.add_argument("--text-column", action="append", help="column of texts in --data; twice for pairs")
    demo.add_argument("--label-column", default="label", help="column to predict in --data")
    demo.add_argument(
        "--other", action="append", default=[], metavar="NAME=DATA", help="a further domain to test on; repeatable"
    )
    demo.add_argument("--train-size", type=int, help="training examples (default: 1000, or all of --data)")
    demo.add_argument("--test-size", type=int, default=500, help="test examples per domain at most")
    demo.add_argument("--epochs", type=int, default=3, help="passes over the training examples")
    demo.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for results and figure")
    demo.add_argument("--cache", type=Path, help="folder for the fetched assets (default: the user's cache folder)")
    return parser


def _demo(options: argparse.Namespace) -> Demo:
    others = dict(other.split("=", 1) for other in options.other if "=" in other)
    if len(others) != len(options.other):
        raise ValueError(f"`--other` must be NAME=DATA with different names, got {options.other}.")
    if others and options.data is None:
        raise ValueError("`--other` goes with `--data`, the data to train on.")
    return Demo(
        output=options.output,
        model=options.model,
        data=options.data,
        text_columns=options.text_column or ["text"],
        label_column=options.label_column,
        others=others,
        train_size=options.train_size,
        test_size=options.test_size,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        seed=options.seed,
        cache=options.cache,
    )


if __name__ == "__main__":
    sys.exit(main())
