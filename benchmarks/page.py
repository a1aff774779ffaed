"""`python -m benchmarks.page`: the page of the benchmarks and its figures, made from the JSON files alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import compact_layer, device_page
from benchmarks.compact_page import section
from benchmarks.findings import Entry, Findings
from benchmarks.memory import KINDS
from benchmarks.plots import SWEEPS, draw_memory, draw_sweep
from benchmarks.ratio import LOADING, MEMORY, target
from benchmarks.rounds import FIGURES
from benchmarks.settings import Settings
from benchmarks.tables import table
from benchmarks.variant import VARIANTS
from peft_dps.compare.report.style import save

ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"
_MIB = 2**20
_HEAD = """\
# Benchmarks

What DPS costs in time and memory beside full fine-tuning of the same parameters. This page is made by
`python -m benchmarks.page` from results of `python -m benchmarks.suite` and `python -m benchmarks.compact`; do not
edit it.

In the tables a figure has its aim in brackets, and **bold** means that it misses it. LoRA has no aims; it is there to
compare.

- **accumulate**, **selecting**, **subnetwork**: time of a step over that of full fine-tuning, the median. Each method
  trains in a process of its own; they take their steps in turn, and a ratio is taken between two steps of the same
  round. "Selecting" is the first step of SUBNETWORK, one in a cycle.
- **memory**: most bytes that torch's allocator had handed out at a time, over that of full fine-tuning; gradients,
  activations and temporary tensors included. On a CPU every tensor is counted that an operator makes or takes, which
  leaves out buffers inside of kernels. **process**: the same ratio of the peak memory of a process that trains nothing
  else, above its state before the model was built; with what the system's malloc keeps for itself, and with pages of
  W0 that are in memory although a file stands behind them.
- **load + first step**: `PeftModel.from_pretrained(base, folder, is_trainable=True)`, the optimizer and one step, over
  `from_pretrained` of a fully fine-tuned checkpoint, the optimizer and one step. The second number includes loading
  the pretrained model that the adapter goes onto.

"Lean" is `lean=True`, and "bf16" is `score_dtype="bfloat16"` with `frozen="gradient"`. Everything else has
`frozen="exact"`.

Models are built from configurations with random weights. The aims: a step 1.02 for Dense and 1.05 for Mix, 1.3 where
it selects, peak memory 1.30 and 1.45 (in lean mode 1.03 and 1.15), loading with the first step 1.05. Everything is in
fp32, with fused AdamW, density {density} and dropout {dropout}, unless a row says otherwise.
"""
_NONE = "There are no results yet: `python -m benchmarks.suite` makes them.\n"


@dataclass(frozen=True)
class Page:
    """A page: its text, and where its images go.

    Attributes:
        text: Markdown.
        images: Per file name, what draws it.
    """

    text: str
    images: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its figures.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    usual = "JSON files (default: all of them in benchmarks/results that it knows)"
    parser.add_argument("--results", type=Path, nargs="+", default=None, help=usual)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page to write")
    options = parser.parse_args(arguments)
    files = options.results or result_files()
    page = make_page({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page.text, encoding="utf-8")
    for name, draw in page.images.items():
        save(draw(), options.out.parent / "images" / name)


def result_files() -> list[Path]:
    """Return the files of the repository that the page is made of."""
    return [
        *sorted(_RESULTS.glob("suite_*.json")),
        *sorted(_RESULTS.glob("compact_*.json")),
        *_RESULTS.glob("layer_cpu.json"),
        *sorted(_RESULTS.glob("device_*.json")),
    ]


def make_page(documents: dict[str, dict[str, Any]]) -> Page:
    """Make the page.

    Args:
        documents: Per name of a file, its content.
    """
    usual = Settings()
    head = _HEAD.format(density=usual.density, dropout=usual.dropout)
    parts, images = [head if documents else f"{head}\n{_NONE}"], {}
    for name, document in documents.items():
        if "device" in document:
            parts.append(f"## {document['device']}\n\n{device_page.page(document)}")
            continue
        if "models" in document:
            parts.append(section(document))
            continue
        if "ratios" in document:
            parts.append(compact_layer.section(document))
            continue
        results = Findings(document)
        parts.append(f"## {name.removeprefix('suite_').upper()}\n\n{_machine(results)}")
        parts.append(f"### Beside full fine-tuning\n\n{_summary(results)}")
        parts.append(f"### Time of a step\n\n{_times(results)}")
        if any(entry.footprints for entry in results.models):
            images[f"{name}_memory.png"] = lambda results=results: draw_memory(results)
            parts.append(f"### Memory by kind\n\n{_memory(results, name)}")
        for field, sizes in results.sweeps().items():
            image = f"{name}_sweep_{field}.png"
            images[image] = lambda results=results, field=field: draw_sweep(results, field)
            parts.append(_sweep(results, field, sizes, image))
    return Page("\n".join(part.rstrip() + "\n" for part in parts), images)


def _machine(results: Findings) -> str:
    machine = results.document["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores ({machine['cpu_capability']}), {machine['memory_gib']} GiB"
    if machine["device"] != "cpu":
        where += f"; {machine['device']}"
    versions = results.entries[0].versions
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "peft_dps"))
    loads = [load for entry in results.entries for load in entry.loads]
    return (
        f"{where}; {packages}.\nLoad of the machine, the benchmark's own included, while this was measured: "
        f"{min(loads):.1f} to {max(loads):.1f}."
    )


def _summary(results: Findings) -> str:
    rows = [("model", "method", *FIGURES, "memory", "process", "load + first step")]
    for entry in results.models:
        for variant in entry.compared:
            loading = entry.loading(variant)
            cells = [_aimed(entry.step(variant, figure), target(variant, figure)) for figure in FIGURES]
            cells.append(_aimed(entry.memory(variant), target(variant, MEMORY)))
            cells.append(_number(entry.process_memory(variant)))
            cells.append(
                "-" if loading is None else f"{_aimed(loading[0], target(variant, LOADING))}; {loading[1]:.2f}"
            )
            rows.append((entry.title, _title(variant), *cells))
    return table(rows)


def _times(results: Findings) -> str:
    rows = [
        ("model", "method", *(f"{figure}: seconds" for figure in FIGURES), *(f"{each}: quartiles" for each in FIGURES))
    ]
    for entry in results.models:
        for variant in entry.variants:
            seconds = [_number(entry.seconds(variant, figure), 3) for figure in FIGURES]
            quartiles = [_quartiles(entry.spread(variant, figure)) for figure in FIGURES]
            rows.append((entry.title, _title(variant), *seconds, *quartiles))
    return table(rows)


def _memory(results: Findings, name: str) -> str:
    text = (
        f"![Stacked bars: bytes by kind, per model, method and stage](images/{name}_memory.png)\n\n"
        "*Bytes by kind at the end of a step of each stage, and the activations that the forward leaves for the "
        "backward pass. The mark is the peak of such a step: most activations are gone before the last gradients are "
        "made, so it may lie below the sum. The table is in MiB.*\n\n"
    )
    shown = (*KINDS, "activations")
    rows = [("model", "method", "step", *shown, "peak")]
    for entry in results.models:
        for variant, footprint in entry.footprints.items():
            for figure in FIGURES if VARIANTS[variant].method else FIGURES[:1]:
                kinds = [f"{footprint['kinds'][figure][kind] / _MIB:.0f}" for kind in shown]
                rows.append((entry.title, _title(variant), figure, *kinds, f"{footprint['peaks'][figure] / _MIB:.0f}"))
    return text + table(rows)


def _sweep(results: Findings, field: str, sizes: dict[str, list[Entry]], image: str) -> str:
    title, unit = SWEEPS[field]
    rows = [("model", unit, "method", *FIGURES, "memory")]
    for entries in sizes.values():
        for entry in entries:
            for variant in entry.compared:
                if VARIANTS[variant].method:
                    cells = [_number(entry.step(variant, figure)) for figure in FIGURES]
                    value = f"{entry.value(field):,}"
                    rows.append((entry.size, value, _title(variant), *cells, _number(entry.memory(variant))))
    return f"### By {title}\n\n![Ratios by {title}](images/{image})\n\n{table(rows)}"


def _title(variant: str) -> str:
    return VARIANTS[variant].method or {"lora": "LoRA"}.get(variant, "full fine-tuning")


def _aimed(value: float | None, aim: float | None) -> str:
    if value is None or aim is None:
        return _number(value)
    shown = f"{value:.2f}" if round(value, 2) <= aim else f"**{value:.2f}**"
    return f"{shown} ({aim:.2f})"


def _quartiles(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['lower']:.2f} to {spread['upper']:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
