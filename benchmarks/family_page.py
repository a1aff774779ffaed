"""`python -m benchmarks.family_page`: the page on the family, from the recipes and what `benchmarks.family` found."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.family import RESULTS
from benchmarks.settings import SIZES
from benchmarks.tables import table
from peft_dps import DPSConfig, recipes
from peft_dps.compare.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, canvas, save
from peft_dps.selection.scores import evidence_of
from peft_dps.selection.stage_length import FRACTION

DOCS = Path(__file__).parents[1] / "docs"
IMAGE = "family.png"
_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#b5a642", GREY)
_MIB = 2**20
_HEAD = """\
# The family

One engine trains all of these methods: each is a function of `peft_dps.recipes` that returns a `DPSConfig`.

```python
from peft import get_peft_model
from peft_dps import recipes

model = get_peft_model(model, recipes.paca(units=16, task_type="SEQ_CLS"))
```

You can combine methods: every field of [`DPSConfig`](api.md#peft_dps.DPSConfig) can be set as well.
`recipes.paca(score="squared_gradient", score_steps=8)` chooses the columns by their gradients. What makes no sense is
an error that names the fields.

<!-- Written by `python -m benchmarks.family_page` from the recipes. Change these, not this file. -->

![Recipes against axes](images/family.png)
"""
_COSTS = """\
## What each costs

{least}Recipes with copies of whole weights, without a file in the table, take more memory than full fine-tuning.
Accuracy is not measured here; [findings](findings.md) has that of some.

{kind} of {layers} layers and width {width}, {batch} sequences of {tokens} tokens, fp32, {optimizer}, {threads}
threads; {machine} (`python -m benchmarks.family`). The methods take their steps in turn, each in a process of its own:
medians of {rounds} ratios within a round, with quartiles. These are steps after a selection, with its mask; those that
score or select cost more ([Dense and Mix](benchmarks.md#copies-of-whole-weights-cpu),
[columns](benchmarks.md#compact-storage)). "Memory" is the peak of a step, the model included; sizes are in MiB. `fish`
and `child_tuning_d` score before training.
"""
_NEIGHBOURS = """\
## Neighbours

These are no recipes, and go together with every recipe:

- **Losses** that ask for similar outputs under noise: LNSR ([2107.04835](https://arxiv.org/abs/2107.04835)), R3F
  ([2008.03156](https://arxiv.org/abs/2008.03156)), SMART ([1911.03437](https://arxiv.org/abs/1911.03437)). They call
  the model twice in a step; a step is an optimizer step, however many forwards it has.
- **Weight averages**: WiSE-FT ([2109.01903](https://arxiv.org/abs/2109.01903)) with factor 0.5 is
  `model.add_weighted_adapter(["default"], [0.5], "halfway")`. LEVI ([2402.04644](https://arxiv.org/abs/2402.04644))
  joins several views.
- **Self-training**: UPET ([Findings of EMNLP 2023](https://aclanthology.org/2023.findings-emnlp.528)) trains few
  parameters on labels of a teacher.

Not here: LoFiT ([2406.01563](https://arxiv.org/abs/2406.01563)) and prompt tuning such as EPT
([2405.11464](https://arxiv.org/abs/2405.11464)), which train new parameters; SPT
([2303.08566](https://arxiv.org/abs/2303.08566)), which places LoRAs by gradients; RoSTE
([2502.09003](https://arxiv.org/abs/2502.09003)), which trains for quantization; DRPruning
([2411.14055](https://arxiv.org/abs/2411.14055)), which removes weights.
"""
_WORDS = """\
## What each is for

The [API](api.md#methods) tells where each differs from its paper and its code.
"""


@dataclass(frozen=True)
class Recipe:
    """A recipe as the page shows it.

    Attributes:
        name: Its name.
        text: The first two paragraphs of its docstring: what it is, and what for.
        axes: Per axis, what it is.
    """

    name: str
    text: str
    axes: dict[str, str]


def read() -> list[Recipe]:
    """Read all recipes."""
    found = []
    for name in recipes.__all__:
        function: Callable[..., DPSConfig] = getattr(recipes, name)
        text = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0].strip()
        found.append(Recipe(name, "\n\n".join(text.split("\n\n")[:2]), axes_of(function())))
    return found


def axes_of(config: DPSConfig) -> dict[str, str]:
    """Return what a configuration says of each axis."""
    size = f"{config.density:g}" if config.units is None else f"{config.units} unit{'s' * (config.units > 1)}"
    noise = config.noise or ("columns" if config.variant == "mix" else "none")
    stage_steps = FRACTION if config.stage_steps is None else config.stage_steps
    steps = stage_steps if config.schedule in ("cycle", "every", "two-phase") else config.score_steps
    rest = noise if noise != "none" else "held" if config.storage == "compact" else config.frozen
    axes = {
        "evidence": config.evidence or evidence_of(config.score),
        "score": config.score,
        "schedule": f"{config.schedule}, {steps:g}",
        "granularity": config.granularity,
        "scope": str(config.scope),
        "how much": size if config.budget == "entries" else f"{size} of {config.budget}",
        "the rest": rest,
        "storage": config.storage,
    }
    if not config.recipe().schedule.selects:
        axes |= {"evidence": "-", "score": "-", "granularity": "-", "scope": "-", "schedule": config.schedule}
    return axes


def draw(found: list[Recipe]) -> Figure:
    """Draw recipes against axes: cells of an axis with the same value have the same colour."""
    axes = list(found[0].axes)
    with canvas(0.3 * len(found) + 0.7, 1.75 * len(axes) + 1.6) as figure:
        panel = figure.subplots()
        for column, axis in enumerate(axes):
            values = list(dict.fromkeys(each.axes[axis] for each in found))
            for row, each in enumerate(found):
                value = each.axes[axis]
                color = _COLORS[values.index(value) % len(_COLORS)]
                panel.add_patch(Rectangle((column, row), 0.96, 0.88, color=color, alpha=0.35, linewidth=0))
                panel.text(column + 0.48, row + 0.45, value.replace("_", " "), ha="center", va="center", fontsize=8)
        panel.set(xlim=(0, len(axes)), ylim=(len(found), 0))
        panel.set_xticks([column + 0.48 for column in range(len(axes))], axes)
        panel.set_yticks([row + 0.45 for row in range(len(found))], [each.name for each in found])
        panel.tick_params(length=0, labeltop=True, labelbottom=False)
        panel.grid(visible=False)
        for spine in panel.spines.values():
            spine.set_visible(False)
    return figure


def make_page(found: list[Recipe], document: dict[str, Any] | None) -> str:
    """Make the page.

    Args:
        found: The recipes.
        document: Content of the results file; None if there is none.
    """
    parts = [_HEAD]
    if document is not None:
        settings, machine = document["settings"], document["machine"]
        rounds = len(next(iter(document["seconds"][0].values())))
        where = {"machine": f"{machine['cpu']}, {machine['cores']} cores", "rounds": rounds, "least": _least(document)}
        parts.append(_COSTS.format(**_shape(settings["size"]), **settings, **where))
        parts.append(table(list(_costs(document)), words=1))
    parts += [_WORDS, *(f"### {each.name}\n\n{each.text}\n" for each in found), _NEIGHBOURS]
    return "\n".join(parts)


def _least(document: dict[str, Any]) -> str:
    """Name the recipes that take less time than the LoRA and less memory."""
    steps = {each["method"]: each["median"] for each in document["ratios"] if each["against"] == "lora"}
    held = document["held"]
    names = [name for name in steps if steps[name] < 1 and held[name]["peak"] < held["lora"]["peak"]]
    names = [name.removeprefix("recipe:") for name in names if name.startswith("recipe:")]
    if not names:
        return ""
    listed = ", ".join(f"`{name}`" for name in names)
    return f"**{listed} take less time, in the median, and less memory than a LoRA of rank 16.**\n\n"


def _shape(size: str) -> dict[str, Any]:
    fields = SIZES[size]
    return {"kind": "A BERT", "layers": fields["num_hidden_layers"], "width": fields["hidden_size"]}


def _costs(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "method", "trained entries", "step / full", "step / LoRA r16", "memory", "file"
    for name, held in document["held"].items():
        found = {each["against"]: each for each in document["ratios"] if each["method"] == name}
        ratios = [
            f"{found[each]['median']:.2f} ({found[each]['lower']:.2f} to {found[each]['upper']:.2f})"
            if each in found
            else "-"
            for each in ("full", "lora")
        ]
        file = "-" if held["file"] is None else f"{held['file'] / _MIB:.2f}"
        yield f"`{name.removeprefix('recipe:')}`", f"{held['trained']:,}", *ratios, f"{held['peak'] / _MIB:.1f}", file


def main() -> None:
    """Write the page and its figure."""
    found = read()
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    (DOCS / "family.md").write_text(make_page(found, document), encoding="utf-8")
    save(draw(found), DOCS / "images" / IMAGE)


if __name__ == "__main__":
    main()
