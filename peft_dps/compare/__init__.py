"""Side-by-side comparison of fine-tuning methods, on the embedded task or on the user's own; `python -m` runs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_dps.compare.data.assets import fetch_assets
    from peft_dps.compare.data.probes import load_probes, register_probe
    from peft_dps.compare.data.task import build_task
    from peft_dps.compare.data.tasks import register_task
    from peft_dps.compare.data.user_data import OwnData
    from peft_dps.compare.methods.choice import Choice
    from peft_dps.compare.methods.table import register_method
    from peft_dps.compare.report.report import write_report
    from peft_dps.compare.runs.comparison import Comparison
    from peft_dps.compare.runs.observer import Observer
    from peft_dps.compare.runs.results import read
    from peft_dps.compare.runs.runner import compare
    from peft_dps.compare.settings import Settings

# Imported when they are asked for: each part of the comparison needs other libraries, and a part may be all one needs.
_MODULES = {
    "Choice": "methods.choice",
    "Comparison": "runs.comparison",
    "Observer": "runs.observer",
    "OwnData": "data.user_data",
    "Settings": "settings",
    "build_task": "data.task",
    "compare": "runs.runner",
    "fetch_assets": "data.assets",
    "load_probes": "data.probes",
    "read": "runs.results",
    "register_method": "methods.table",
    "register_probe": "data.probes",
    "register_task": "data.tasks",
    "write_report": "report.report",
}

__all__ = [
    "Choice",
    "Comparison",
    "Observer",
    "OwnData",
    "Settings",
    "build_task",
    "compare",
    "fetch_assets",
    "load_probes",
    "read",
    "register_method",
    "register_probe",
    "register_task",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
