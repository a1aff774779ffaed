"""The results of a suite: one JSON file, into which runs are merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.machine import describe_machine, list_versions, load

VERSION = 1
_DIGITS = 4


class Archive:
    """Results of cases, by name; each part of a case keeps the conditions under which it was measured.

    Args:
        path: The file; it need not exist.
        device: "cpu" or "cuda".

    Raises:
        ValueError: If the file has results of another machine.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        machine = {**describe_machine(), "device": "cpu" if device == "cpu" else torch.cuda.get_device_name()}
        self.document: dict[str, Any] = {"version": VERSION, "machine": machine, "cases": {}}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if (known.get("version"), known.get("machine")) != (VERSION, machine):
                raise ValueError(
                    f"`out` names {path}, which has results of another machine or form: {known.get('machine')}, and "
                    f"this is {machine}. Name another file, or delete it."
                )
            self.document = known

    def part(self, case: Case, name: str) -> dict[str, Any] | None:
        """Return what is known of a part of a case, "memory", "steps" or "load"; None if nothing is."""
        entry = self.document["cases"].get(case.name, {})
        return entry.get("parts", {}).get(name)

    def measure(self, case: Case, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a part of a case, put it in the place of what was known of it, and write the file.

        Args:
            case: The case.
            name: Name of the part.
            work: What measures it.

        Returns:
            What it returned.
        """
        before = load()
        found = work()
        entry = self.document["cases"].setdefault(case.name, {"parts": {}})
        entry.update(trained=case.trained, variants=case.variants, swept=case.swept)
        entry["parts"][name] = {
            "settings": asdict(case.settings),
            "versions": list_versions(),
            "load_before": before,
            "load_after": load(),
            **rounded({"found": found}),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        return found


def rounded(value: Any) -> Any:
    """Round the floats in nested lists and dicts to the digits that mean something."""
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
