"""`python -m benchmarks.page`: the page of the benchmarks and its figures, made from the JSON files alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import compact_layer, device_page, low_memory
from benchmarks.compact_page import section
from benchmarks.findings import SIZE, Entry, Findings
from benchmarks.memory import KINDS
from benchmarks.plots import SWEEPS, draw_memory, draw_sweep
from benchmarks.ratio import LOADING, MEMORY, target
from benchmarks.rounds import ACCUMULATE, FIGURES, SUBNETWORK
from benchmarks.settings import Settings
from benchmarks.tables import table
from benchmarks.variant import DENSE, MIX, VARIANTS
from peft_dps.compare.report.style import save

ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"
_MIB = 2**20
_HEAD = """\
# Benchmarks

<!-- Written by `python -m benchmarks.page` from the files in benchmarks/results. Change these, not this file. -->

Time and memory of peft_dps beside full fine-tuning and LoRA, measured by the programs in `benchmarks/`. Models have
the shape of the real ones and random weights. `benchmarks/results/` holds every number. An aim is a limit that we had
set before we measured.
"""
_COPIES = """\
## Copies of whole weights, {where}

A copy (`storage="copy"`, the default) trains every targeted weight beside its frozen original. It costs more than
full fine-tuning; `lean=True` takes most of that memory back. Ratios are to full fine-tuning of the same parameters,
the aim in brackets, **bold** where it is missed. LoRA (rank 8) has no aim.

- **accumulate**, **selecting**, **subnetwork**: a step's time, the median of ratios within a round in which each
  method takes one step; a process for each. "Selecting" is one step in a cycle.
- **memory**: the most bytes that tensors held at a time. **process**: the peak of a process that trains by that method
  alone, above its state before the model was built; with what malloc keeps and pages of mapped files.
- **load + first step**: `PeftModel.from_pretrained`, the optimizer and one step, over the same from a checkpoint of
  full fine-tuning; the second number includes loading the pretrained model.

"Lean" is `lean=True`, "bf16" is `score_dtype="bfloat16"` with `frozen="gradient"`; the others have `frozen="exact"`.
fp32, fused AdamW, density {density} and dropout {dropout}, unless a row says otherwise.
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
        *sorted(_RESULTS.glob("compact_*.json")),
        *_RESULTS.glob("low_memory_cpu.json"),
        *_RESULTS.glob("layer_cpu.json"),
        *sorted(_RESULTS.glob("suite_*.json")),
        *sorted(_RESULTS.glob("device_*.json")),
    ]


def make_page(documents: dict[str, dict[str, Any]]) -> Page:
    """Make the page.

    Args:
        documents: Per name of a file, its content.
    """
    usual = Settings()
    parts, images = [_HEAD if documents else f"{_HEAD}\n{_NONE}"], {}
    if not any("device" in document for document in documents.values()):
        parts.append("Nothing has been measured on a GPU yet.\n")
    for name, document in documents.items():
        if "device" in document:
            parts.append(f"## {document['device']}\n\n{device_page.page(document)}")
            continue
        if "ways" in document:
            parts.append(low_memory.section(document))
            continue
        if "models" in document:
            parts.append(section(document))
            continue
        if "ratios" in document:
            parts.append(compact_layer.section(document))
            continue
        results = Findings(document)
        where = name.removeprefix("suite_").upper()
        parts.append(_COPIES.format(where=where, density=usual.density, dropout=usual.dropout))
        parts.append(f"{_machine(results)}\n\n{_summary(results)}")
        if any(entry.footprints for entry in results.models):
            images[f"{name}_memory.png"] = lambda results=results: draw_memory(results)
            parts.append(f"### Memory by kind\n\n{_memory(results, name)}")
        if sweeps := results.sweeps():
            drawn = {field: f"{name}_sweep_{field}.png" for field in sweeps}
            images |= {
                drawn[field]: lambda results=results, field=field: draw_sweep(results, field) for field in sweeps
            }
            parts.append(f"### By size, batch, length and density\n\n{_sweeps(sweeps, drawn)}")
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
        f"{where}; {packages}. Load of the machine, the benchmark's own included: {min(loads):.1f} to "
        f"{max(loads):.1f}.\n"
        f"{_spread(results)}"
    )


def _spread(results: Findings) -> str:
    found = [
        entry.spread(variant, figure) for entry in results.models for variant in entry.compared for figure in FIGURES
    ]
    widths = [each["upper"] - each["lower"] for each in found if each is not None]
    return (
        f"Quartiles of a ratio are {median(widths):.2f} apart in the median, {max(widths):.2f} at most."
        if widths
        else ""
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


def _memory(results: Findings, name: str) -> str:
    """Return the figure of all models, and a table of the first."""
    entry = next(entry for entry in results.models if entry.footprints)
    shown = (*KINDS, "activations")
    text = (
        f"![Stacked bars: bytes by kind, per model, method and stage](images/{name}_memory.png)\n\n"
        "*Bytes by kind at the end of a step of each stage, and the activations that the forward leaves for the "
        "backward pass. The mark is the peak of such a step: most activations are gone before the last gradients are "
        f"made, so it may lie below the sum.*\n\n{entry.title}, in MiB, in the stage with the highest peak:\n\n"
    )
    rows = [("method", *shown, "peak")]
    for variant, footprint in entry.footprints.items():
        figure = max(FIGURES if VARIANTS[variant].method else FIGURES[:1], key=footprint["peaks"].__getitem__)
        kinds = [f"{footprint['kinds'][figure][kind] / _MIB:.0f}" for kind in shown]
        rows.append((_title(variant), *kinds, f"{footprint['peaks'][figure] / _MIB:.0f}"))
    return text + table(rows, words=1)


def _sweeps(sweeps: dict[str, dict[str, list[Entry]]], images: dict[str, str]) -> str:
    """Return a table of Dense and Mix over all sweeps, and a figure of each with all methods."""
    shown = [(method, figure) for method in (DENSE, MIX) for figure in (ACCUMULATE, SUBNETWORK, MEMORY)]
    rows = [("", "", *(f"{method.removeprefix('DPS ')}: {figure}" for method, figure in shown))]
    for field, lines in sweeps.items():
        for name, entries in lines.items():
            for entry in entries:
                variants = {VARIANTS[variant].method: variant for variant in entry.compared}
                cells = [_number(_swept(entry, variants.get(method), figure)) for method, figure in shown]
                value = entry.size if field == SIZE else f"{entry.value(field):,}"
                rows.append((f"{SWEEPS[field][0]}, {name}", value, *cells))
    figures = [f"![Ratios by {SWEEPS[field][0]}](images/{image})" for field, image in images.items()]
    return "\n\n".join((table(rows).rstrip(), *figures))


def _swept(entry: Entry, variant: str | None, figure: str) -> float | None:
    if variant is None:
        return None
    return entry.memory(variant) if figure == MEMORY else entry.step(variant, figure)


def _title(variant: str) -> str:
    return VARIANTS[variant].method or {"lora": "LoRA"}.get(variant, "full fine-tuning")


def _aimed(value: float | None, aim: float | None) -> str:
    if value is None or aim is None:
        return _number(value)
    shown = f"{value:.2f}" if round(value, 2) <= aim else f"**{value:.2f}**"
    return f"{shown} ({aim:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
