"""What a model card says of an adapter that DPS trained."""

from __future__ import annotations

from peft_dps.tuner.config import DPSConfig
from peft_dps.training.controller import Subnetwork

_SCOPES = {"tensor": "chosen within each weight", "model": "chosen over all weights together"}
_POLICIES = {"exact": "keep their bits", "gradient": "have no gradient; momentum and weight decay move them"}
_SHOWN = 6  # names of modules


def describe(config: DPSConfig, subnetwork: Subnetwork) -> str:
    """Write the section.

    Args:
        config: The adapter's configuration.
        subnetwork: What is known of its training, in this process. Only counts are read, no tensors: one process
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
        *(f"| {name} | {value} |" for name, value in _rows(config, subnetwork)),
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


def _rows(config: DPSConfig, subnetwork: Subnetwork) -> list[tuple[str, str]]:
    rows = [
        ("variant", f"`{config.variant}`"),
        ("density of the subnetwork", f"{config.density:g}, {_SCOPES[config.scope]}"),
        ("length of a stage", _length(config, subnetwork)),
        ("score", f"`{config.score}`"),
        ("frozen entries in SUBNETWORK", _POLICIES[config.frozen]),
        ("targeted weights", f"{len(subnetwork.weights)}, of {_entries(subnetwork)} entries"),
        ("biases of targeted modules", "trained" if config.train_bias else "not trained"),
        ("modules trained in full beside them", _names(config.modules_to_save)),
        ("seed of the method", str(config.seed)),
    ]
    position = subnetwork.position
    if position is None:
        return [*rows, ("training", "none in the process that saved this")]
    rows += [
        ("optimizer steps", str(subnetwork.step)),
        ("saved in", f"cycle {position.cycle}, {position.stage.name}, step {position.step_in_stage} of the stage"),
        ("selected at the latest selection", _selected(subnetwork)),
    ]
    if subnetwork.loaded_after == subnetwork.step:
        rows.append(("weights", "loaded after the last of these steps, as those of a better checkpoint are"))
    return rows


def _length(config: DPSConfig, subnetwork: Subnetwork) -> str:
    steps, schedule = config.stage_steps, subnetwork.schedule
    if not isinstance(steps, float):
        return f"{steps} steps"
    return f"{steps:g} of all steps" + ("" if schedule is None else f": {schedule.stage_steps} steps")


def _selected(subnetwork: Subnetwork) -> str:
    counts = [weight.selected for weight in subnetwork.weights if weight.selected is not None]
    if not counts:
        return "none before the first SUBNETWORK stage"
    entries = _entries(subnetwork)
    return f"{sum(counts)} of {entries} entries ({sum(counts) / entries:.1%})"


def _entries(subnetwork: Subnetwork) -> int:
    return sum(weight.layer.entries for weight in subnetwork.weights)


def _names(names: list[str] | None) -> str:
    shown = [f"`{name}`" for name in sorted(names or [])]
    if len(shown) > _SHOWN:
        return f"{', '.join(shown[:_SHOWN])} and {len(shown) - _SHOWN} more"
    return ", ".join(shown) or "none"
