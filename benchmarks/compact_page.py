"""The part of the page on compact storage: what was aimed at, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.compact_methods import METHODS
from benchmarks.tables import table

_MIB = 2**20
_HEAD = """\
## Compact storage

`python -m benchmarks.compact`, in fp32 with {optimizer} and without dropout, on {threads} threads, on all linear
layers. `columns`, `rows` and `entries` train {density:.0%} of them, `columns-units` {units} columns of each, `blocks`
the upper half of the layers whole. LoRA has rank {rank}; LoRA-FA is a LoRA whose A is frozen; SHiRA has as many
entries as `columns`; `copy` is DPS with copies of whole weights. In `scoring` each step scores columns and trains
nothing but the head. `full` trains everything, embeddings included.

- **step**: the ratio of two steps of the same round, the median over rounds, with quartiles. Each method has a process
  of its own; one computes while the others wait, in an order that changes.
- **kept**: bytes that the forward saves for the backward pass, parameters and buffers left out
  (`torch.autograd.graph.saved_tensors_hooks`).
- **peak**: most bytes that were allocated in a step, the model included. **process**: most bytes of a process that
  trains by that method alone, above its state before the model was built. Units were selected before the first step,
  so that no scoring is in either.
- **file**: the adapter's file as `save_pretrained` writes it.

All sizes are in MiB.
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
    parts = [_HEAD.format(**first["plan"], optimizer=settings["optimizer"], threads=settings["threads"])]
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
            f"{versions}; load {loads[0]:.1f} before and {loads[1]:.1f} after; {malloc}. **Bold**: not met.\n"
        )
        parts.append(table(list(_aims(model))))
        parts.append(table(list(_methods(model))))
    return "\n".join(parts)


def _aims(model: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "figure", "is", "aim", "measured"
    for aim in AIMS:
        found, most = aim.read(model), aim.most(model)
        if found is not None:
            met = round(found, 3) <= round(most, 3)
            yield (
                aim.title,
                "met" if met else "not met",
                f"{most:.3f}",
                f"{found:.3f}" if met else f"**{found:.3f}**",
            )


def _methods(model: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    against = ("full", "lora", "lora-fa")
    yield (
        "method",
        "trains",
        "entries",
        *(f"step / {name}" for name in against),
        "kept",
        "peak",
        "process",
        "gradients",
        "optimizer",
        "file",
    )
    for name, held in model["held"].items():
        found = {each["against"]: each for each in model["ratios"] if each["method"] == name}
        ratios = [
            f"{found[each]['median']:.3f} ({found[each]['lower']:.3f} to {found[each]['upper']:.3f})"
            if each in found
            else "-"
            for each in against
        ]
        sizes = [f"{held[each] / _MIB:.1f}" for each in ("kept", "peak", "process", "gradients", "optimizer")]
        file = "-" if held["file"] is None else f"{held['file'] / _MIB:.1f}"
        yield name, METHODS[name].description, f"{held['trained']:,}", *ratios, *sizes, file
