"""`Findings`: what a file of the suite holds, as a page asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import LINEAR
from benchmarks.settings import DECODER, ENCODER, ENCODERS, SIZES
from benchmarks.variant import VARIANTS

FIELDS = ("batch", "tokens", "density")
SIZE = "size"


class Entry:
    """One case of a file.

    Args:
        name: Its name.
        content: What the file has of it.
    """

    def __init__(self, name: str, content: dict[str, Any]) -> None:
        self.name = name
        self.variants: list[str] = content["variants"]
        self.trained: str = content["trained"]
        self.swept: str | None = content["swept"]
        self._parts: dict[str, Any] = content["parts"]
        first = next(iter(self._parts.values()))
        self.settings: dict[str, Any] = first["settings"]
        self.versions: dict[str, str] = first["versions"]
        self.size: str = self.settings["size"]

    @property
    def kind(self) -> str:
        """What sort of model it is."""
        return ENCODER if self.size in ENCODERS else DECODER

    @property
    def title(self) -> str:
        """The model, and the batch it was trained on."""
        what = f"{self.size}, linear layers" if self.trained == LINEAR else self.size
        return f"{what}, {self.settings['batch']} x {self.settings['tokens']}"

    @property
    def compared(self) -> list[str]:
        """The variants that are held against full fine-tuning."""
        return self.variants[1:]

    @property
    def loads(self) -> list[float]:
        """Load of the machine before and after each part."""
        return [part[name] for part in self._parts.values() for name in ("load_before", "load_after")]

    @property
    def footprints(self) -> dict[str, Any]:
        """Per variant, its memory; empty if it was not counted."""
        found: dict[str, Any] = self._found("memory", {})
        return found

    @property
    def entries_trained(self) -> int | None:
        """Entries that full fine-tuning trains; None if no step was timed."""
        runs = self._found("steps", {}).get("runs", [])
        return runs[0][self.variants[0]]["trained_entries"] if runs else None

    def value(self, field: str) -> float:
        """Return a setting; the size of the model as trained entries."""
        return (self.entries_trained or 0) if field == SIZE else self.settings[field]

    def spread(self, variant: str, figure: str) -> dict[str, float] | None:
        """Return median and quartiles of step-time ratios; None if they were not measured."""
        for ratio in self._found("steps", {}).get("ratios", []):
            if (ratio["variant"], ratio["figure"]) == (variant, figure):
                return ratio["step"]
        return None

    def step(self, variant: str, figure: str) -> float | None:
        """Return the median step-time ratio."""
        spread = self.spread(variant, figure)
        return None if spread is None else spread["median"]

    def memory(self, variant: str) -> float | None:
        """Return the ratio of peaks at torch's allocator."""
        found = self.footprints
        return found[variant]["peak"] / found[self.variants[0]]["peak"] if variant in found else None

    def process_memory(self, variant: str) -> float | None:
        """Return the ratio of peaks of the processes; None on an accelerator, whose memory it does not show."""
        if self.settings["device"] != "cpu":
            return None
        found = self.footprints
        ours, theirs = (found.get(name, {}).get("process") for name in (variant, self.variants[0]))
        return ours / theirs if ours and theirs else None

    def loading(self, variant: str) -> tuple[float, float] | None:
        """Return the median ratios of loading and first step, without and with loading the base."""
        for ratio in self._found("load", {}).get("ratios", []):
            if ratio["variant"] == variant:
                return ratio["load"]["median"], ratio["load_with_base"]["median"]
        return None

    def _found(self, part: str, default: Any) -> Any:
        return self._parts[part]["found"] if part in self._parts else default


class Findings:
    """What a file holds.

    Args:
        document: Its content.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        order = list(SIZES)
        found = [Entry(name, content) for name, content in document["cases"].items()]
        for entry in found:
            entry.variants = [name for name in entry.variants if name in VARIANTS]
        self.entries = sorted(found, key=lambda entry: (order.index(entry.size), entry.name))

    @property
    def models(self) -> list[Entry]:
        """The cases that are measured for the model's sake, and not as a point of a sweep."""
        return [entry for entry in self.entries if entry.swept is None]

    def sweeps(self) -> dict[str, dict[str, list[Entry]]]:
        """Find the cases that differ in one setting alone.

        Returns:
            Per setting, per name of a line of cases (a model; encoders or decoders, for their size), at least two
            cases by the setting's value.
        """
        swept: dict[str, dict[str, list[Entry]]] = {}
        for model in self.models:
            alike = [entry for entry in self.models if _differ(entry, model) <= {SIZE} and entry.kind == model.kind]
            if len(alike) > 1:
                kind = f"{model.kind}s, linear layers" if model.trained == LINEAR else f"{model.kind}s"
                swept.setdefault(SIZE, {})[kind] = _by_value(alike, SIZE)
        for field in FIELDS:
            for model in self.models:
                alike = [entry for entry in self.entries if _differ(entry, model) <= {field}]
                if len(alike) > 1:
                    swept.setdefault(field, {})[model.name] = _by_value(alike, field)
        return swept


def _by_value(entries: Sequence[Entry], field: str) -> list[Entry]:
    timed = [entry for entry in entries if entry.entries_trained is not None]
    return sorted(timed, key=lambda entry: entry.value(field))


def _differ(one: Entry, other: Entry) -> set[str]:
    names = {name for name in one.settings if one.settings[name] != other.settings[name]}
    return names - {"cycles", "warmup", "stage_steps"} | ({"trained"} if one.trained != other.trained else set())
