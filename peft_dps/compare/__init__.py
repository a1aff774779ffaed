"""Side-by-side comparison of fine-tuning methods, on the embedded task or on the user's own; `python -m` runs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_dps.compare.choice import Choice
    from peft_dps.compare.comparison import Comparison
    from peft_dps.compare.methods import register_method
    from peft_dps.compare.observer import Observer
    from peft_dps.compare.own import OwnData
    from peft_dps.compare.plan import Settings
    from peft_dps.compare.report import write_report
    from peft_dps.compare.results import read
    from peft_dps.compare.runner import compare
    from peft_dps.compare.task import build_task
    from peft_dps.compare.tasks import register_task

# Imported when they are asked for: each part of the comparison needs other libraries, and a part may be all one needs.
_MODULES = {
    "Choice": "choice",
    "Comparison": "comparison",
    "Observer": "observer",
    "OwnData": "own",
    "Settings": "plan",
    "build_task": "task",
    "compare": "runner",
    "read": "results",
    "register_method": "methods",
    "register_task": "tasks",
    "write_report": "report",
}

__all__ = [
    "Choice",
    "Comparison",
    "Observer",
    "OwnData",
    "Settings",
    "build_task",
    "compare",
    "read",
    "register_method",
    "register_task",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
