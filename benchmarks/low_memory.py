"""`python -m benchmarks.low_memory`: columns beside LoRA where other means save memory already.

A decoder is trained plainly, with gradient checkpointing, in 4 bits, and with both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks.archive import rounded
from benchmarks.compact import known_results, measure, positive
from benchmarks.compact_methods import Plan
from benchmarks.models import build_model
from benchmarks.progress import begin
from benchmarks.settings import Settings
from benchmarks.tables import table

METHODS = LORA, _, COLUMNS = ("lora", "lora-fa", "columns-units")
WAYS = {
    "fp32": (False, False),
    "fp32, gradient checkpointing": (True, False),
    "4 bits": (False, True),
    "4 bits, gradient checkpointing": (True, True),
}
"""Per name: with gradient checkpointing? in 4 bits?"""
_SETTINGS = {
    False: Settings(size="decoder-0.5b-32k", batch=2, tokens=256, optimizer="adamw-fused", dropout=0.0),
    True: Settings(size="decoder-toy-pair", batch=2, tokens=16, optimizer="adamw-fused", dropout=0.0),
}
_RESULTS = Path(__file__).parent / "results" / "low_memory_cpu.json"
_MIB = 2**20
_HEAD = """\
### With gradient checkpointing, and in 4 bits

{lead}{size}, {batch} x {tokens}, {optimizer}, {threads} threads; LoRA of rank {rank}, `columns-units` with {units}
columns. In 4 bits the base is loaded by transformers and bitsandbytes (NF4) and computes in bf16; adapters are fp32.
Checkpointing computes each block a second time in the backward pass. **after forward**: what the forward has
allocated when the backward pass begins. Times are medians of {rounds} rounds with quartiles; in 4 bits they are those
of bitsandbytes on a CPU, and say little of GPUs. Sizes are in MiB.

{machine[cpu]}, {machine[cores]} cores ({machine[cpu_capability]}), {machine[memory_gib]} GiB; {versions}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the ways that are asked for, and merge the results into a file.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    tell = begin()
    out = options.out or (Path("runs/low_memory_tiny.json") if options.tiny else _RESULTS)
    document = known_results(out, "ways")
    disable_progress_bar()
    settings = replace(_SETTINGS[options.tiny], threads=options.threads)
    for way in options.way:
        tell(way)
        with tempfile.TemporaryDirectory() as folder:
            plan = _plan(way, settings, Path(folder))
            document["ways"][way] = rounded(measure(METHODS, plan, options.warmup, options.rounds, tell))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    tell(f"All numbers are in {out}.")


def _plan(way: str, settings: Settings, folder: Path) -> Plan:
    checkpointing, four_bits = WAYS[way]
    if four_bits:
        build_model(settings).save_pretrained(folder)
    return Plan(settings, checkpointing=checkpointing, four_bits=folder if four_bits else None)


def section(document: dict[str, Any]) -> str:
    """Make the part of the page.

    Args:
        document: Content of a results file.
    """
    ways, machine = document["ways"], document["machine"]
    first = next(iter(ways.values()))
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "transformers", "peft"))
    rounds = len(first["seconds"][0][COLUMNS])
    named = {"lead": _lead(ways), "machine": machine, "versions": versions, "rounds": rounds}
    head = _HEAD.format(**first["settings"] | first["plan"] | named)
    return f"{head}\n{table(list(_rows(ways)))}"


def _lead(ways: dict[str, Any]) -> str:
    """Say what columns take of a LoRA's step and peak, in each way."""
    parts = []
    for way, found in ways.items():
        peak = found["held"][COLUMNS]["peak"] / found["held"][LORA]["peak"]
        parts.append(f"{_ratio(found, COLUMNS)['median']:.2f} and {peak:.2f} ({way})")
    return f"**Columns take this much of a LoRA's step and peak memory:** {'; '.join(parts)}.\n\n"


def _rows(ways: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "way", "method", "entries", f"step / {LORA}", "after forward", "peak", f"peak / {LORA}"
    for way, found in ways.items():
        for name, held in found["held"].items():
            ratio = "-" if name == LORA else "{median:.2f} ({lower:.2f} to {upper:.2f})".format(**_ratio(found, name))
            sizes = [f"{held[each] / _MIB:.0f}" for each in ("alive", "peak")]
            peak = "-" if name == LORA else f"{held['peak'] / found['held'][LORA]['peak']:.2f}"
            yield way, f"`{name}`", f"{held['trained']:,}", ratio, *sizes, peak


def _ratio(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the times of a method's steps beside those of LoRA."""
    return next(each for each in found["ratios"] if (each["method"], each["against"]) == (name, LORA))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.low_memory",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--way", nargs="+", choices=WAYS, default=list(WAYS), help="ways to measure")
    add("--rounds", type=positive, default=12, help="rounds that count")
    add("--warmup", type=positive, default=2, help="rounds before them")
    add("--threads", type=int, default=2, help="threads that each method computes on")
    add("--tiny", action="store_true", help="a toy in place of the model, to try it out")
    add("--out", type=Path, default=None, help="JSON file to merge into (default: results/low_memory_cpu.json)")
    return parser


if __name__ == "__main__":
    main()
