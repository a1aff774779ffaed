"""`python -m benchmarks.suite`: time and memory of DPS beside full fine-tuning, over models and settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.archive import Archive
from benchmarks.cases import ALL, METHODS, Case, measure_load, measure_memory, measure_steps, sweep
from benchmarks.progress import Tell, begin
from benchmarks.settings import OPTIMIZERS, SIZES, Settings
from benchmarks.variant import VARIANTS

MEMORY, STEPS, LOAD = PARTS = ("memory", "steps", "load")
_RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases that are asked for, and merge the results into a file.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    tell = begin()
    out = options.out or _RESULTS / f"suite_{options.device}.json"
    results = Archive(out, options.device)
    for case in cases_of(options):
        loads = case.swept is None and case.settings.size in options.load_models
        parts = [part for part in options.measure if part != LOAD or loads]
        measure(results, case, parts, options.load_rounds, tell)
    tell(f"All numbers are in {out}; `python -m benchmarks.page` makes a page of them.")


def measure(results: Archive, case: Case, parts: Sequence[str], load_rounds: int, tell: Tell) -> None:
    """Measure parts of a case. What variants take of memory has to be known before several are timed at once.

    Args:
        results: Where results go.
        case: The case.
        parts: Which of `PARTS`.
        load_rounds: How often a variant is loaded.
        tell: Told of progress.
    """
    known = results.part(case, MEMORY)
    footprints = None if known is None or not set(case.variants) <= set(known["found"]) else known["found"]
    if MEMORY in parts or (STEPS in parts and footprints is None):
        footprints = results.measure(case, MEMORY, lambda: measure_memory(case, tell))
    if STEPS in parts and footprints is not None:
        results.measure(case, STEPS, lambda: measure_steps(case, tell, footprints))
    if LOAD in parts:
        results.measure(case, LOAD, lambda: measure_load(case, tell, load_rounds))


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line: its models, and the sweeps over a setting of one model."""
    taken = {field.name: getattr(options, field.name) for field in fields(Settings) if hasattr(options, field.name)}
    methods = None if options.methods is None else tuple(options.methods)
    cases = [Case(Settings(**taken, size=size), options.trained, methods) for size in options.models]
    center = Case(Settings(**taken, size=options.sweep_model), options.trained, methods)
    for field, values in (("batch", options.batches), ("tokens", options.lengths), ("density", options.densities)):
        cases += [case for case in sweep(center, field, values) if case.name not in {each.name for each in cases}]
    return cases


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="*", choices=SIZES, default=["small", "decoder-small", "base"], help="models to measure")
    add("--trained", choices=METHODS, default=ALL, help="what is trained: all parameters, or the linear layers alone")
    add("--methods", nargs="+", choices=VARIANTS, default=None, help="variants beside full fine-tuning (usual: all)")
    add("--measure", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--sweep-model", choices=SIZES, default="small", help="model of the sweeps")
    add("--batches", nargs="*", type=_positive, default=[4, 64], help="sweep: sequences in a batch")
    add("--lengths", nargs="*", type=_positive, default=[16, 256], help="sweep: tokens in a sequence")
    add("--densities", nargs="*", type=float, default=[0.1, 0.3, 0.9], help="sweep: density")
    add("--load-models", nargs="*", choices=SIZES, default=["base"], help="models whose loading is measured")
    add("--load-rounds", type=_positive, default=7, help="how often a variant is loaded")
    add("--batch", type=_positive, default=default.batch, help="sequences in a batch")
    add("--tokens", type=_positive, default=default.tokens, help="tokens in a sequence")
    add("--density", type=float, default=default.density, help="fraction of entries in the subnetwork")
    add("--stage-steps", type=_positive, default=default.stage_steps, help="steps in a stage, at least 2")
    add("--cycles", type=_positive, default=default.cycles, help="cycles to train; each gives one step that selects")
    add("--warmup", type=int, default=default.warmup, help="first steps to leave out of the figures")
    add("--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="optimizer of all variants")
    add("--dropout", type=float, default=default.dropout, help="dropout of the models")
    add("--threads", type=_positive, default=None, help="threads (default: torch's choice)")
    add("--device", choices=("cpu", "cuda"), default=default.device, help="where to compute")
    add("--seed", type=int, default=default.seed, help="seed of weights, batch and dropout")
    add(
        "--out",
        type=Path,
        default=None,
        help="JSON file to merge into (default: benchmarks/results/suite_DEVICE.json)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
