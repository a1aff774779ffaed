"""`python -m benchmarks.family`: what each recipe costs, beside full fine-tuning and LoRA."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.archive import rounded
from benchmarks.compact import measure
from benchmarks.compact_methods import RECIPES, REFERENCES, Plan
from benchmarks.machine import describe_machine
from benchmarks.progress import begin
from benchmarks.settings import Settings

RESULTS = Path(__file__).parent / "results" / "family_cpu.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every recipe, and write the results.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="medium", help="model to measure on")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them, in which units are selected")
    parser.add_argument("--threads", type=int, default=2, help="threads that each method computes on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args(arguments)
    tell = begin()
    settings = Settings(
        size=options.size, batch=options.batch, tokens=options.tokens, threads=options.threads, dropout=0.0
    )
    names = [*REFERENCES, *RECIPES]
    found = rounded(measure(names, Plan(settings), options.warmup, options.rounds, tell))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
