"""`python -m benchmarks.compact`: time and memory of compact storage beside full fine-tuning, LoRA and SHiRA."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from benchmarks.archive import rounded
from benchmarks.compact_methods import METHODS, REFERENCES, USUAL, Plan
from benchmarks.compact_page import section
from benchmarks.compact_worker import Worker
from benchmarks.crew import crew_of
from benchmarks.footprint import usual_malloc
from benchmarks.machine import describe_machine, list_versions, load
from benchmarks.progress import Tell, begin
from benchmarks.ratio import Spread
from benchmarks.rounds import turned
from benchmarks.settings import Settings

VERSION = 1
BERT, LARGE_DECODER = MODELS = ("bert", "decoder")
_SETTINGS = {
    (BERT, False): Settings(size="base", batch=16, tokens=64),
    (BERT, True): Settings(size="toy-pair", batch=2, tokens=8),
    (LARGE_DECODER, False): Settings(size="decoder-0.5b-32k", batch=4, tokens=64),
    (LARGE_DECODER, True): Settings(size="decoder-toy-pair", batch=2, tokens=8),
}
_RESULTS = Path(__file__).parent / "results"
_PROCESS = 600 * 2**20  # what a process takes before it has a model
_USABLE = 0.9  # of the memory that is free now


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that are asked for, and merge the results into a file.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    tell = begin()
    out = options.out or (Path("runs/compact_tiny.json") if options.tiny else _RESULTS / "compact_cpu.json")
    document = known_results(out)
    for model in options.model:
        settings = replace(_SETTINGS[model, options.tiny], threads=options.threads, dropout=0.0)
        plan = Plan(replace(settings, optimizer=options.optimizer), options.density, options.rank, options.units)
        names = [name for name in METHODS if name in {*options.methods, *REFERENCES}]
        document["models"][settings.size] = rounded(measure(names, plan, options.warmup, options.rounds, tell))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(section(document), encoding="utf-8")
    tell(f"All numbers are in {out}; its tables are beside it.")


def measure(names: Sequence[str], plan: Plan, warmup: int, rounds: int, tell: Tell) -> dict[str, Any]:
    """Measure memory, then step times.

    Args:
        names: Names of the methods, at least two of `REFERENCES` among them, to which ratios are taken.
        plan: What they have in common.
        warmup: Rounds that count for nothing.
        rounds: Rounds that count.
        tell: Told of progress.

    Returns:
        What was found; JSON-ready.
    """
    before, held = load(), {}
    for name in names:
        tell(f"{plan.settings.size}: memory of {name}")
        with usual_malloc(), crew_of(Worker, [name], plan) as crew:
            held[name] = asdict(crew.ask(name, "hold"))
    needs = {name: max(each["process"], each["peak"]) + _PROCESS for name, each in held.items()}
    references = [name for name in REFERENCES if name in names]
    groups = grouped(names, needs, int(_USABLE * psutil.virtual_memory().available), references)
    runs = [run_rounds(group, plan, warmup, rounds, tell) for group in groups]
    return {
        "settings": asdict(plan.settings),
        "plan": {"density": plan.density, "rank": plan.rank, "units": plan.units},
        "versions": list_versions(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "load": [before, load()],
        "held": held,
        "groups": groups,
        "seconds": runs,
        "ratios": list(_ratios(runs, references)),
    }


def grouped(
    names: Sequence[str], needs: dict[str, int], limit: int, references: Sequence[str] = REFERENCES
) -> list[list[str]]:
    """Put methods together whose needs add up to at most a limit, the references into each group.

    A method that does not fit beside all references is timed beside the first of them alone.

    Args:
        names: Names of the methods.
        needs: Bytes that each needs.
        limit: Bytes that there are.
        references: Names of the methods that the others are held against, at least two.

    Raises:
        MemoryError: If a method and the first reference need more.
    """
    others = sorted((name for name in names if name not in references), key=lambda name: -needs[name])
    groups: list[list[str]] = []
    for name in others:
        whole, alone = ([group for group in groups if (references[1] in group) is each] for each in (True, False))
        candidates = [*whole, [*references], *alone, [references[0]]]
        group = next((each for each in candidates if sum(needs[one] for one in (*each, name)) <= limit), None)
        if group is None:
            raise MemoryError(
                f"{references[0]} and {name} need {(needs[references[0]] + needs[name]) / 2**30:.1f} GiB, and "
                f"{limit / 2**30:.1f} GiB may be used. Leave {name!r} out of `--methods`."
            )
        if group not in groups:
            groups.append(group)
        group.append(name)
    return groups or [[*references]]


def run_rounds(names: Sequence[str], plan: Plan, warmup: int, rounds: int, tell: Tell) -> dict[str, list[float]]:
    """Let each method make a step in each round, one after the other in a changing order.

    Args:
        names: Names of the methods.
        plan: What they have in common.
        warmup: Rounds that count for nothing.
        rounds: Rounds that count.
        tell: Told of progress.

    Returns:
        Per method, the seconds of its steps.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with crew_of(Worker, names, plan) as crew:
        for number in range(warmup + rounds):
            order = turned(names, number // 2)
            for name in order if number % 2 else reversed(order):
                taken = crew.ask(name, "step")
                if number >= warmup:
                    seconds[name].append(taken)
            tell(f"{plan.settings.size}: {len(names)} methods: round {number + 1} of {warmup + rounds}")
    return seconds


def _ratios(runs: Sequence[dict[str, list[float]]], references: Sequence[str]) -> Iterator[dict[str, Any]]:
    first = next((run for run in runs if run.keys() >= {*references}), None)
    for run in runs:
        for name, reference in product(run, (name for name in references if name in run)):
            if name != reference and (name not in references or run is first):
                pairs = zip(run[name], run[reference], strict=True)
                spread = Spread.of([own / other for own, other in pairs])
                yield {"method": name, "against": reference, **asdict(spread)}


def known_results(path: Path, part: str = "models") -> dict[str, Any]:
    """Return what a file holds already.

    Args:
        path: The file; it need not exist.
        part: What its results are by.

    Raises:
        ValueError: If it is of another machine.
    """
    machine = describe_machine()
    if not path.exists():
        return {"version": VERSION, "machine": machine, part: {}}
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if (known.get("version"), known.get("machine")) != (VERSION, machine):
        raise ValueError(
            f"`out` names {path}, which has results of another machine or form: {known.get('machine')}, and this is "
            f"{machine}. Name another file, or delete it."
        )
    return known


def _parser() -> argparse.ArgumentParser:
    default = Plan(Settings())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compact",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure")
    add("--methods", nargs="+", choices=METHODS, default=list(USUAL), help=f"methods beside {', '.join(REFERENCES)}")
    add("--rounds", type=positive, default=20, help="rounds that count")
    add("--warmup", type=positive, default=3, help="rounds before them; `copy` has selected after 2")
    add("--density", type=float, default=default.density, help="fraction of units or entries to train")
    add("--rank", type=int, default=default.rank, help="rank of LoRA")
    add("--units", type=int, default=default.units, help="columns of `columns-units`")
    add(
        "--optimizer", choices=("adamw-fused", "adamw-foreach"), default="adamw-fused", help="optimizer of all methods"
    )
    add("--threads", type=int, default=2, help="threads that each method computes on")
    add("--tiny", action="store_true", help="toys in place of the models, to try it out")
    add(
        "--out", type=Path, default=None, help="JSON file to merge into (default: benchmarks/results/compact_cpu.json)"
    )
    return parser


def positive(text: str) -> int:
    """Read a number of a flag that must be at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
