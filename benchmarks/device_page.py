"""Results of `benchmarks.device` as a table in Markdown."""

from __future__ import annotations

from typing import Any

_COLUMNS = ("method", "trains", "entries", "step", "ms", "of full", "peak GiB", "kept GiB", "waits")
_READING = (
    "Random weights in bf16, fused AdamW. Times, and ratios to full fine-tuning in the same round, are medians. "
    '"Kept" is what the forward leaves for the backward pass, "waits" how often a step waits for the device.'
)


def page(result: dict[str, Any]) -> str:
    """Write the tables.

    Args:
        result: What `benchmarks.device` has measured.
    """
    settings, versions = result["settings"], result["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "peft_dps"))
    sizes = f"{settings['batch']} x {settings['tokens']} tokens, density {settings['density']}"
    stages = f"stages of {settings['stage_steps']} steps, {settings['cycles']} cycles"
    lines = [f"{result['device']}; {named}; {result['date']}. {sizes}, {stages}. {_READING}"]
    for size, methods in result["models"].items():
        lines += ["", f"**{size}**", "", _row(_COLUMNS), _row(["---", "---", *["---:"] * (len(_COLUMNS) - 2)])]
        for name, found in methods.items():
            lines += _rows(name, found)
    return "\n".join(lines) + "\n"


def _rows(name: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [_row([name, found["trains"], "-", found["error"].replace("|", "/"), *["-"] * 5])]
    rows = []
    for figure, values in found["figures"].items():
        rows.append(
            _row(
                [
                    name,
                    found["trains"],
                    f"{found['trained_entries'] / 1e6:.1f}M",
                    figure,
                    f"{1000 * values['seconds']:.1f}",
                    f"{values['ratio']:.2f}",
                    f"{values['peak'] / 2**30:.2f}",
                    f"{values['kept'] / 2**30:.2f}",
                    str(values["waits"]),
                ]
            )
        )
    return rows


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
