"""`python -m benchmarks.family_page`: the page on the family, from the recipes and what `benchmarks.family` found."""

from __future__ import annotations

import inspect
import json
import textwrap
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

Every field of [`DPSConfig`](api.md) can be set as well, so that axes combine:
`recipes.paca(score="squared_gradient", score_steps=8)` chooses the columns by their gradients. Whatever makes no sense
is refused by the names of its fields.

This page is made by `python -m benchmarks.family_page` from the recipes themselves; do not edit it.

![Recipes against axes](images/family.png)

## What each is made of
"""
_COSTS = """\
## What each costs

`python -m benchmarks.family`: {kind} of {layers} layers and width {width}, {batch} sequences of {tokens} tokens, fp32,
{optimizer}, {threads} threads; {machine}. Each method has a process of its own, and they take their steps in turn; a
ratio is taken between two steps of the same round, and the table has the median of {rounds} rounds with its quartiles.
Steps are those after the first selection. "Memory" is the most that was allocated in a step, the model included;
"file" is the adapter's file.

Recipes with copies of whole weights train all linear layers and their biases, and cost more than full fine-tuning.
Compact ones train what is selected alone.
"""
_NEIGHBOURS = """\
## Neighbours

Some methods near this family are another kind of thing. They go together with it.

**Losses.** LNSR ([NAACL 2021](https://arxiv.org/abs/2107.04835)), R3F ([ICLR
2021](https://arxiv.org/abs/2008.03156)) and SMART ([ACL 2020](https://arxiv.org/abs/1911.03437)) add a term to the
loss that asks for similar outputs on inputs or hidden states that differ by noise. They call the model twice in a
step. That works with every recipe: a step is an optimizer step, however many forwards it has.

**Ensembles and weight averages.** WiSE-FT ([CVPR 2022](https://arxiv.org/abs/2109.01903)) averages pretrained and
fine-tuned weights after training; LEVI ([ICML 2024](https://arxiv.org/abs/2402.04644)) joins several views. Of an
adapter of ours, `model.add_weighted_adapter(["default"], [0.5], "halfway")` is the WiSE-FT average with factor 0.5.

**Self-training.** UPET ([Findings of EMNLP 2023](https://aclanthology.org/2023.findings-emnlp.528)) labels examples
by a teacher whose uncertainty it measures, and trains few parameters on them. Any recipe can be those parameters.

**Choices inside of attention.** LoFiT ([NeurIPS 2024](https://arxiv.org/abs/2406.01563)) chooses attention heads and
trains vectors that it adds to their outputs. These vectors are new parameters, not a part of the weights.

**Other tuners.** SPT ([ICCV 2023](https://arxiv.org/abs/2303.08566)) lets gradients decide where to put LoRAs.
RoSTE ([2025](https://arxiv.org/abs/2502.09003)) trains for quantization. EPT ([AAAI
2025](https://arxiv.org/abs/2405.11464)) and other prompt tuning train inputs. DRPruning ([ACL
2025](https://arxiv.org/abs/2411.14055)) removes weights and chooses what to train on; what is frozen here stays in
use.
"""


@dataclass(frozen=True)
class Recipe:
    """A recipe as the page shows it.

    Attributes:
        name: Its name.
        text: Its docstring, without the arguments.
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
        found.append(Recipe(name, text, axes_of(function())))
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
    axes = list(found[0].axes)
    rows = [("recipe", "", *axes), *((f"`{each.name}`", "", *each.axes.values()) for each in found)]
    parts = [_HEAD, table(rows), *map(_described, found)]
    if document is not None:
        settings, machine = document["settings"], document["machine"]
        rounds = len(next(iter(document["seconds"][0].values())))
        shape = _shape(settings["size"])
        parts.append(
            _COSTS.format(**shape, **settings, machine=f"{machine['cpu']}, {machine['cores']} cores", rounds=rounds)
        )
        parts.append(table(list(_costs(document))))
    parts.append(_NEIGHBOURS)
    return "\n".join(parts)


def _described(recipe: Recipe) -> str:
    return f"### {recipe.name}\n\n{textwrap.dedent(recipe.text)}\n"


def _shape(size: str) -> dict[str, Any]:
    fields = SIZES[size]
    return {"kind": "a BERT", "layers": fields["num_hidden_layers"], "width": fields["hidden_size"]}


def _costs(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "method", "trained entries", "step / full", "step / LoRA r16", "memory, MiB", "kept for backward", "file"
    for name, held in document["held"].items():
        found = {each["against"]: each for each in document["ratios"] if each["method"] == name}
        ratios = [
            f"{found[each]['median']:.2f} ({found[each]['lower']:.2f} to {found[each]['upper']:.2f})"
            if each in found
            else "-"
            for each in ("full", "lora")
        ]
        sizes = [f"{held[each] / _MIB:.1f}" for each in ("peak", "kept")]
        file = "-" if held["file"] is None else f"{held['file'] / _MIB:.2f}"
        yield f"`{name.removeprefix('recipe:')}`", f"{held['trained']:,}", *ratios, *sizes, file


def main() -> None:
    """Write the page and its figure."""
    found = read()
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    (DOCS / "family.md").write_text(make_page(found, document), encoding="utf-8")
    save(draw(found), DOCS / "images" / IMAGE)


if __name__ == "__main__":
    main()
