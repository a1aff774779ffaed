"""The part of the page on compact storage: what was aimed at, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.compact_methods import METHODS
from benchmarks.tables import table

_MIB = 2**20
_SIZES = ("kept", "peak", "process")
_HEAD = """\
## Compact storage

{lead}fp32, {optimizer}, no dropout, {threads} threads, all linear layers. `columns`, `rows` and `entries` train
{density:.0%} of them, `columns-units` {units} columns of each, `blocks` the upper half of the layers whole, `full`
everything. LoRA has rank {rank}; LoRA-FA freezes its A; SHiRA trains as many entries as `columns`; `copy` is DPS with
copies of whole weights. `scoring` scores columns in each step and trains the head alone.

- **step**: the ratio of two steps of the same round, the median with quartiles. Each method has a process of its own;
  one computes while the others wait, in an order that changes.
- **kept**: what the forward saves for the backward pass. **peak**: the most that tensors held in a step, the model
  included. **process**: the peak of a process that trains by that method alone, above its state before the model was
  built. No step that scores is in these.
- **file**: the adapter as `save_pretrained` writes it. Sizes are in MiB.
"""


@dataclass(frozen=True)
class Aim:
    """What a figure of a method should not exceed.

    Attributes:
        figure: What is compared.
        method: Name of the method.
        against: Name of the method that it is held against; None for none.
        most: What the figure should not exceed, or what tells it, of a model's results.
        read: Returns the figure, of a model's results; None where it was not measured.
    """

    figure: str
    method: str
    against: str | None
    most: Callable[[dict[str, Any]], float]
    read: Callable[[dict[str, Any]], float | None]

    @property
    def title(self) -> str:
        """What a table calls it."""
        return f"{self.method}: {self.figure}" + (f" beside {self.against}" if self.against else "")


def _step(method: str, against: str, most: float) -> Aim:
    def read(model: dict[str, Any]) -> float | None:
        return next((each["median"] for each in model["ratios"] if _is(each, method, against)), None)

    return Aim("step", method, against, lambda _: most, read)


def _is(ratio: dict[str, Any], method: str, against: str) -> bool:
    return (ratio["method"], ratio["against"]) == (method, against)


def _held(figure: str, method: str, against: str, most: float) -> Aim:
    def read(model: dict[str, Any]) -> float | None:
        own, other = (model["held"].get(name) for name in (method, against))
        return None if own is None or other is None or not other[figure] else own[figure] / other[figure]

    return Aim(figure, method, against, lambda _: most, read)


def _scoring(figure: str) -> Aim:
    """While it scores, a method may hold what LoRA does and one layer's dW."""

    def most(model: dict[str, Any]) -> float:
        lora = model["held"]["lora"]
        return 1.0 + lora["largest"] / max(1, lora[figure])

    return Aim(figure, "scoring", "lora", most, _held(figure, "scoring", "lora", 1.0).read)


def _per_entry() -> Aim:
    def read(model: dict[str, Any]) -> float | None:
        own = model["held"].get("entries")
        return None if own is None else own["per_entry"]

    return Aim("bytes per target entry", "entries", None, lambda model: 4 + 16 * model["plan"]["density"], read)


def _file(method: str) -> Aim:
    def read(model: dict[str, Any]) -> float | None:
        own = model["held"].get(method)
        return None if own is None else own["file"] / own["content"]

    return Aim("file / (values and indices)", method, None, lambda _: 1.1, read)


AIMS = (
    _step("columns", "full", 0.71),
    _step("columns", "lora", 0.90),
    _step("columns", "lora-fa", 0.95),
    _held("kept", "columns", "lora", 0.66),
    *(
        _held(figure, "columns", against, most)
        for against, most in (("lora", 0.85), ("lora-fa", 1.00), ("shira", 0.65))
        for figure in ("peak", "process")
    ),
    _step("scoring", "full", 1.05),
    _scoring("peak"),
    _scoring("process"),
    _step("blocks", "full", 0.64),
    _per_entry(),
    *(_file(name) for name, method in METHODS.items() if method.is_compact),
)


def section(document: dict[str, Any]) -> str:
    """Make the part of the page.

    Args:
        document: Content of a results file.
    """
    first = next(iter(document["models"].values()))
    settings = first["settings"]
    named = {"lead": _lead(first), "optimizer": settings["optimizer"], "threads": settings["threads"]}
    parts = [_HEAD.format(**first["plan"], **named)]
    machine = document["machine"]
    parts.append(
        f"{machine['cpu']}, {machine['cores']} cores ({machine['cpu_capability']}), {machine['memory_gib']} GiB.\n"
    )
    for name, model in document["models"].items():
        settings, loads = model["settings"], model["load"]
        versions = ", ".join(f"{each} {model['versions'][each]}" for each in ("torch", "transformers", "peft"))
        malloc = ", ".join(f"`{key}={value}`" for key, value in model["malloc"].items()) or "no settings of malloc"
        parts.append(
            f"### {name}, {settings['batch']} x {settings['tokens']}\n\n"
            f"{versions}; load {loads[0]:.1f} before and {loads[1]:.1f} after; {malloc}.\n"
        )
        parts.append(table(list(_methods(model)), words=1))
        parts.append(_aims(model))
    return "\n".join(parts)


def _lead(model: dict[str, Any]) -> str:
    """Say what compact columns save beside LoRA; nothing where that was not measured."""
    step = _step("columns-units", "lora", 1.0).read(model)
    peak = _held("peak", "columns-units", "lora", 1.0).read(model)
    if step is None or peak is None:
        return ""
    less = model["held"]["columns-units"]["trained"] / model["held"]["lora"]["trained"]
    units, rank, size = model["plan"]["units"], model["plan"]["rank"], model["settings"]["size"]
    return (
        f"**Columns, {units} of each layer, take {step:.2f} of the step and {peak:.2f} of the peak memory of a LoRA "
        f"of rank {rank}**, with {less:.2f} of its entries ({size}).\n\n"
    )


def _aims(model: dict[str, Any]) -> str:
    """Name the aims that are missed, and say how many there are."""
    found = [(aim, aim.read(model), aim.most(model)) for aim in AIMS]
    measured = [(aim.title, round(is_, 3), round(most, 3)) for aim, is_, most in found if is_ is not None]
    missed = [(title, f"{most:.3f}", f"{is_:.3f}") for title, is_, most in measured if is_ > most]
    count = f"{len(measured) - len(missed)} of {len(measured)} aims are met"
    if not missed:
        return f"{count}.\n"
    return f"{count}. Missed:\n\n{table([('figure', 'aim', 'measured'), *missed], words=1)}"


def _methods(model: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    against = ("full", "lora")
    yield "method", "entries", *(f"step / {name}" for name in against), *_SIZES, "file"
    for name, held in model["held"].items():
        found = {each["against"]: each for each in model["ratios"] if each["method"] == name}
        ratios = [
            f"{found[each]['median']:.3f} ({found[each]['lower']:.3f} to {found[each]['upper']:.3f})"
            if each in found
            else "-"
            for each in against
        ]
        sizes = [f"{held[each] / _MIB:.1f}" for each in _SIZES]
        file = "-" if held["file"] is None else f"{held['file'] / _MIB:.1f}"
        yield f"`{name}`", f"{held['trained']:,}", *ratios, *sizes, file
