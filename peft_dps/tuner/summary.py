"""What a model card says of an adapter that DPS trained."""

from __future__ import annotations

from peft_dps.training.controller import Controller
from peft_dps.tuner.config import DPSConfig

_SCOPES = {"tensor": "chosen within each weight", "model": "chosen over all weights together"}
_POLICIES = {"exact": "keep their bits", "gradient": "have no gradient; momentum and weight decay move them"}
_SHOWN = 6  # names of modules


def describe(config: DPSConfig, controller: Controller) -> str:
    """Write the section.

    Args:
        config: The adapter's configuration.
        controller: What is known of its training, in this process. Only counts are read, no tensors: one process
            of several may be the one that saves.

    Returns:
        A section in Markdown.
    """
    story = (
        f"This adapter was made by DPS {config.variant.capitalize()} (Zhang et al., NeurIPS 2022, "
        "[arXiv:2211.01642](https://arxiv.org/abs/2211.01642)), with the package `peft_dps`. In turns, an ACCUMULATE "
        "stage trains all entries of the targeted weights and scores them, and a SUBNETWORK stage trains only the "
        "best-scored ones."
    )
    lines = [
        "## Dynamic Parameter Selection",
        "",
        story,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(config, controller)),
        "",
        "Loading it takes one more line, which makes PEFT know DPS:",
        "",
        "```python",
        "import peft_dps",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "<this folder or repository>")',
        "```",
    ]
    return "\n".join(lines)


def _rows(config: DPSConfig, controller: Controller) -> list[tuple[str, str]]:
    rows = [
        ("variant", f"`{config.variant}`"),
        ("density of the controller", f"{config.density:g}, {_SCOPES[str(config.scope)]}"),
        ("length of a stage", _length(config, controller)),
        ("score", f"`{config.score}`"),
        ("frozen entries in SUBNETWORK", _POLICIES.get(config.frozen, f"`{config.frozen}`")),
        ("targeted weights", f"{len(controller.weights)}, of {_entries(controller)} entries"),
        ("biases of targeted modules", "trained" if config.train_bias else "not trained"),
        ("modules trained in full beside them", _names(config.modules_to_save)),
        ("seed of the method", str(config.seed)),
    ]
    position = controller.clock.position
    if position is None:
        return [*rows, ("training", "none in the process that saved this")]
    rows += [
        ("optimizer steps", str(controller.clock.step)),
        ("saved in", f"cycle {position.cycle}, {position.phase.stage.name}, step {position.step} of the stage"),
        ("selected at the latest selection", _selected(controller)),
    ]
    if controller.loaded_after == controller.clock.step:
        rows.append(("weights", "loaded after the last of these steps, as those of a better checkpoint are"))
    return rows


def _length(config: DPSConfig, controller: Controller) -> str:
    steps, position = config.stage_steps, controller.clock.position
    if not isinstance(steps, float):
        return f"{steps} steps"
    return f"{steps:g} of all steps" + ("" if position is None else f": {position.length} steps")


def _selected(controller: Controller) -> str:
    counts = [weight.selected for weight in controller.weights if weight.selected is not None]
    if not counts:
        return "none before the first SUBNETWORK stage"
    entries = _entries(controller)
    return f"{sum(counts)} of {entries} entries ({sum(counts) / entries:.1%})"


def _entries(controller: Controller) -> int:
    return sum(weight.layer.entries for weight in controller.weights)


def _names(names: list[str] | None) -> str:
    shown = [f"`{name}`" for name in sorted(names or [])]
    if len(shown) > _SHOWN:
        return f"{', '.join(shown[:_SHOWN])} and {len(shown) - _SHOWN} more"
    return ", ".join(shown) or "none"
