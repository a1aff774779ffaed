"""The section of a model card on how DPS trained the adapter: what it says, and its place in the file."""

from __future__ import annotations

import re
from pathlib import Path

from peft_dps.selection.phase import Position
from peft_dps.training.controller import Controller
from peft_dps.tuner.config import DPSConfig
from peft_dps.tuner.peft_interface import SAFETENSORS_WEIGHTS_NAME

# The section is marked, so that it is found and replaced when the card is written again.
_BEGIN, _END = "<!-- peft_dps: written on saving, replaced on saving again -->", "<!-- end of peft_dps -->"
_SCOPES = {
    "tensor": "chosen within each weight",
    "category": "chosen within attention and the rest of each layer",
    "model": "chosen over all weights together",
}
_BUDGETS = {"entries": "", "units": " of the weights", "flops": " of the FLOPs of the backward pass"}
_POLICIES = {"exact": "keep their bits", "gradient": "have no gradient; momentum and weight decay move them"}
_SHOWN = 6  # names of modules
_TOP = re.compile(r"(---\n.*?\n---\n)?(\s*# [^\n]*\n)?", re.DOTALL)  # the metadata and the title


def write_section(section: str, path: Path) -> None:
    """Put the section into a model card: in place of an earlier one, or below the title, where it is read.

    PEFT writes one card beside all adapters. Those that lie in folders of their own get one each.
    """
    if not path.is_file() and not path.with_name(SAFETENSORS_WEIGHTS_NAME).is_file():
        return
    section = f"{_BEGIN}\n{section}\n{_END}"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    earlier = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    replaced, found = earlier.subn(lambda _: section, text, count=1)
    if not found:
        place = _TOP.match(text)
        end = place.end() if place else 0
        replaced = f"{text[:end].rstrip()}\n\n{section}\n\n{text[end:].lstrip()}".lstrip()
    path.write_text(replaced, encoding="utf-8")


def make_section(config: DPSConfig, controller: Controller) -> str:
    """Make the section, in Markdown."""
    table = "\n".join(f"| {name} | {value} |" for name, value in _rows(config, controller))
    return f"""\
## Load this adapter

Import `peft_dps` before PEFT or transformers load this adapter. Without it they raise `KeyError: 'DPS'`.

```python
import peft_dps
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<this folder or repository>")
```

## How it was trained

{_method(config)}

| | |
|---|---|
{table}"""


def _is_dps(config: DPSConfig) -> bool:
    return config.schedule == "cycle" and config.storage == "copy" and config.granularity == "entry"


def _method(config: DPSConfig) -> str:
    if _is_dps(config):
        return (
            f"By DPS {config.variant.capitalize()} (Zhang et al., NeurIPS 2022, "
            "[arXiv:2211.01642](https://arxiv.org/abs/2211.01642)), with the package `peft_dps`. In turns, an "
            "ACCUMULATE stage trains all entries of the targeted weights and scores them, and a SUBNETWORK stage "
            "trains only the best-scored ones."
        )
    return "With the package `peft_dps`, which scores the parts of the targeted weights and trains those selected."


def _rows(config: DPSConfig, controller: Controller) -> list[tuple[str, str]]:
    weights, step, position = controller.existing, controller.clock.step, controller.clock.position
    entries = sum(weight.layer.entries for weight in weights)
    selected = [weight.selected for weight in weights if weight.selected is not None]
    rows = [
        *([("variant", f"`{config.variant}`")] if _is_dps(config) else []),
        ("selected as a whole", f"`{config.granularity}`"),
        ("density of the subnetwork", f"{_amount(config)}, {_SCOPES.get(str(config.scope), f'`{config.scope}`')}"),
        _length(config, position),
        ("score", f"`{config.score}`"),
        ("frozen entries in SUBNETWORK", _POLICIES.get(config.frozen, f"`{config.frozen}`")),
        ("targeted weights", f"{len(weights)}, of {entries} entries"),
        ("biases of targeted modules", "trained" if config.train_bias else "not trained"),
        ("modules trained in full beside them", _names(config.modules_to_save)),
        ("seed of the method", str(config.seed)),
    ]
    if position is None:
        return [*rows, ("training", "none in the process that saved this")]
    share = f"{sum(selected)} of {entries} entries ({sum(selected) / entries:.1%})"
    rows += [
        ("optimizer steps", str(step)),
        ("saved in", f"cycle {position.cycle}, {position.phase.stage.name}, step {position.step} of the stage"),
        ("selected at the latest selection", share if selected else "none before the first SUBNETWORK stage"),
    ]
    if controller.loaded_after == step:
        rows.append(("weights", "loaded after the last of these steps, as those of a better checkpoint are"))
    return rows


def _length(config: DPSConfig, position: Position | None) -> tuple[str, str]:
    if config.schedule == "once":
        return "steps of scoring", str(config.score_steps) if config.score_steps else "none: scored before training"
    if isinstance(config.stage_steps, int):
        return "length of a stage", f"{config.stage_steps} steps"
    fraction = "" if config.stage_steps is None else f"{config.stage_steps:g} of all steps"
    known = "" if position is None or position.length is None else f"{position.length} steps"
    return "length of a stage", ": ".join(filter(None, [fraction, known])) or "known when training begins"


def _amount(config: DPSConfig) -> str:
    if config.units is not None:
        return f"{config.units} units"
    return f"{config.density:g}{_BUDGETS.get(config.budget, f' (`{config.budget}`)')}"


def _names(names: list[str] | None) -> str:
    shown = [f"`{name}`" for name in sorted(names or [])]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more or "none"
