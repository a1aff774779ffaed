"""`python -m benchmarks.mask_agreement`: masks from cheaper scores beside the exact ones, in a real fine-tuning.

DPS Dense trains with exact scores. At each switch masks are also chosen from scores that take less memory, gathered
from the same gradients, and compared with those in use: `kept` is the fraction of the exact masks that the others have
too. Random masks of that size would have the density.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from benchmarks.engine import MomentScores, TargetWeight, masks_in_force, select, target_weights
from benchmarks.file_size import batches
from benchmarks.machine import describe_machine, list_versions
from peft_dps import DPSConfig
from peft_dps.compare.data.assets import fetch_assets
from peft_dps.compare.data.sentiment import sentiment_task
from peft_dps.compare.data.task import tokenize
from peft_dps.compare.runs.pretrained import quieten
from peft_dps.compare.settings import Settings


class Gathered:
    """What cheaper scores of one weight are made of, in the stage that runs."""

    def __init__(self, weight: TargetWeight, optimizer: AdamW) -> None:
        self.weight = weight
        self.state = optimizer.state[weight.parameter]
        self.decay = optimizer.param_groups[0]["betas"][1]
        moment = self.state.get("exp_avg_sq")
        self.before = None if moment is None else moment.clone()
        self.scores = MomentScores(self.before, 1 - self.decay)
        self.bfloat16 = torch.zeros_like(weight.weight, dtype=torch.bfloat16)

    def step(self) -> None:
        """Look at the gradient that the optimizer is about to apply."""
        self.scores.count_step(self.decay)
        self.bfloat16 = (self.bfloat16.float() + self.weight.gradient**2).bfloat16()

    def masks(self, density: float) -> dict[str, torch.Tensor]:
        """Choose a mask from each of the scores."""
        now = self.state["exp_avg_sq"]
        scores = {
            "second moment of the stage (lean)": self.scores.scores(now, torch.empty_like(now)),
            "second moment as it is": now,
            "sums in bfloat16": self.bfloat16,
        }
        return {name: select(each, density) for name, each in scores.items()}


def compare_masks(density: float, stage_steps: int, steps: int, learning_rate: float, seed: int) -> list[Any]:
    """Train once, and compare masks at each switch.

    Args:
        density: Fraction of entries in the subnetwork.
        stage_steps: Steps of a stage.
        steps: Optimizer steps of the training.
        learning_rate: Of AdamW, constant.
        seed: Of the new head, the data's order and dropout.

    Returns:
        Per cycle: its number, and the fraction of the exact masks that each of the others kept.
    """
    assets = fetch_assets()
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    task = sentiment_task(assets.corpora, Settings(validation_size=100, test_size=100)).draw(2000, seed)
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(assets.model, num_labels=2)
    config = DPSConfig(density=density, stage_steps=stage_steps, task_type="SEQ_CLS", train_remaining=True)
    model = get_peft_model(base, config).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    gathered: list[Gathered] = []
    chosen: list[dict[str, torch.Tensor]] = []
    cycles = []
    for number, batch in enumerate(islice(batches(tokenize(task.train, tokenizer, 64), tokenizer), steps)):
        if number % (2 * stage_steps) == 0:
            gathered = [Gathered(weight, optimizer) for weight in target_weights(model)]
        model(**batch).loss.backward()
        if number % (2 * stage_steps) < stage_steps:
            for each in gathered:
                each.step()
        elif number % (2 * stage_steps) == stage_steps:
            chosen = [each.masks(density) for each in gathered]
        optimizer.step()
        optimizer.zero_grad()
        if number % (2 * stage_steps) == stage_steps:
            exact = masks_in_force(model)
            kept = {name: _kept(exact, [masks[name] for masks in chosen]) for name in chosen[0]}
            cycles.append({"cycle": len(cycles) + 1, "kept": kept})
    return cycles


def _kept(exact: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    both = sum(int((one & two).sum()) for one, two in zip(exact, other, strict=True))
    return both / sum(int(one.sum()) for one in exact)


def main() -> None:
    """Train with each setting and seed, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--densities", type=float, nargs="+", default=[0.1, 0.3, 0.7], help="densities")
    add("--stage-steps", type=int, nargs="+", default=[5, 20], help="lengths of a stage")
    add("--cycles", type=int, default=4, help="cycles of each training")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="seeds")
    add("--learning-rate", type=float, default=5e-5, help="learning rate of AdamW")
    add("--out", type=Path, default=Path("runs/mask_agreement.json"), help="JSON file to write")
    options = parser.parse_args()
    quieten()
    document: dict[str, Any] = {"machine": describe_machine(), "versions": list_versions(), "runs": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for stage_steps in options.stage_steps:
        for density in options.densities:
            for seed in options.seeds:
                steps = 2 * stage_steps * (options.cycles - 1) + stage_steps + 1
                cycles = compare_masks(density, stage_steps, steps, options.learning_rate, seed)
                run = {"density": density, "stage_steps": stage_steps, "seed": seed, "cycles": cycles}
                document["runs"].append(run)
                options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                later = {
                    name: round(statistics.mean(cycle["kept"][name] for cycle in cycles[1:]), 4)
                    for name in cycles[0]["kept"]
                }
                print(f"density {density}, stages of {stage_steps}, seed {seed}: {later}", flush=True)


if __name__ == "__main__":
    main()
