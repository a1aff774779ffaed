"""What a comparison says of itself before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.runs.comparison import Comparison


@pytest.mark.parametrize(
    ("methods", "reference", "expected"),
    [
        (["lora", "full"], None, "full"),
        (["lora", "bitfit"], None, "lora"),
        (["lora", "bitfit"], "bitfit", "bitfit"),
    ],
)
def test_methods_are_tested_against_full_fine_tuning_or_else_the_first(methods, reference, expected):
    comparison = Comparison(Path("runs.jsonl"), methods=[Choice(name) for name in methods], reference=reference)
    assert comparison.tested_against == expected
