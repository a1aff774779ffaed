"""`python -m benchmarks`: time and memory of DPS beside plain fine-tuning of the same model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import load
from benchmarks.report import to_document, to_tables
from benchmarks.rounds import Round, run_rounds
from benchmarks.settings import OPTIMIZERS, SIZES, Settings
from benchmarks.variant import VARIANTS

# Wide enough for every table: a cut table is no Markdown.
_WIDTH = 160
# All variants at once need more memory than most machines have.
DEFAULT = ("full", "dps-remaining", "mix-remaining")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, show its tables and write its JSON file.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    console = Console(stderr=True)
    before = load()
    with Progress(console=console) as progress:
        task = progress.add_task(f"{len(options.variants)} variants, step by step", total=settings.rounds)

        def tell(each: Round) -> None:
            progress.advance(task)
            if not console.is_terminal:  # where the bar is drawn only at the end
                console.print(f"Round {each.number} of {settings.rounds} is done.")

        run = run_rounds(options.variants, settings, tell)
    document = to_document(run, settings, (before, load()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    output = Console(width=_WIDTH)
    for table in to_tables(run):
        output.print(table)
    console.print(f"All numbers are in {options.out}.")


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default=default.size, help="size of the encoder")
    parser.add_argument("--batch", type=_positive, default=default.batch, help="sequences in a batch")
    parser.add_argument("--tokens", type=_positive, default=default.tokens, help="tokens in a sequence")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="optimizer of all variants")
    parser.add_argument("--density", type=float, default=default.density, help="fraction of entries in the subnetwork")
    parser.add_argument("--stage-steps", type=_positive, default=default.stage_steps, help="steps in a stage")
    parser.add_argument("--cycles", type=_positive, default=default.cycles, help="cycles to train")
    parser.add_argument("--warmup", type=int, default=default.warmup, help="first steps to leave out of the figures")
    parser.add_argument("--dropout", type=float, default=default.dropout, help="dropout of the model")
    parser.add_argument("--threads", type=_positive, default=None, help="threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of weights, batch and dropout")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT), help="what to run")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"), help="JSON file to write")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
