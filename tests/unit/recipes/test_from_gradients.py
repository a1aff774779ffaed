"""Methods that select once from gradients, step by step against plain slow code."""

from __future__ import annotations

import re

import pytest
import torch

import tests.compact  # noqa: F401  # registers tiles of up to three rows and columns
from peft_dps import recipes
from tests.unit.recipes.selective import (
    NAMES,
    Selective,
    best_entries_of_each,
    best_of_all,
    follow,
    loss_of,
    make_batches,
    make_net,
    resume,
)  # fmt: skip

pytestmark = pytest.mark.device

ALL = [f"blocks.{block}.{name}" for block in (0, 1) for name in NAMES]
INPUTS = [name for name in ALL if name.endswith(("q_proj", "k_proj", "v_proj"))]
EXAMPLES = 4
TILES = {"granularity": "tile", "score_steps": 2, "density": 0.2}
# Per recipe: fields to suit a small net, the layers that it selects from, and what the reference does.
CASES = {
    "sift": ({"target_modules": list(NAMES)}, ALL, {"scored": 1, "select": best_entries_of_each(0.05)}),
    "smt": (TILES, INPUTS, {"scored": 2, "select": best_of_all(0.2, lambda i: (i[0] // 2, i[1] // 2))}),
    "fish": (
        {"target_modules": list(NAMES), "density": 0.02},
        ALL,
        {"select": best_of_all(0.02), "gather": torch.square},
    ),
    "child_tuning_d": (
        {"target_modules": list(NAMES)},
        ALL,
        {"select": best_of_all(0.3), "gather": torch.square, "decays": True, "others": True},
    ),
}


def score(model) -> None:
    if next(iter(model.peft_config.values())).score_steps == 0:
        model.dps_score(make_batches(2, size=EXAMPLES), loss_of, per_example=True)


def reference_of(name: str) -> Selective:
    _, layers, what = CASES[name]
    reference = Selective(make_net(), layers, **what)
    if not reference.scored:
        for x, y in make_batches(2, size=EXAMPLES):
            for example in range(EXAMPLES):
                reference.score((x[example : example + 1], y[example : example + 1]))
    return reference


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_trains_what_the_reference_does(name, micro_batches):
    config = getattr(recipes, name)(**CASES[name][0])
    model = follow(config, reference_of(name), score, micro_batches=micro_batches)
    assert 0 < model.dps_status().selected < model.dps_status().entries


@pytest.mark.parametrize("name", CASES)
def test_it_resumes_in_the_middle(name, tmp_path):
    resume(getattr(recipes, name)(**CASES[name][0]), tmp_path, score, decays=name == "child_tuning_d")


def test_the_defaults_are_the_papers():
    found = {name: getattr(recipes, name)() for name in CASES}
    assert {name: config.density for name, config in found.items()} == {
        "sift": 0.05, "smt": 0.035, "fish": 0.005, "child_tuning_d": 0.3,
    }  # fmt: skip
    assert {name: config.score_steps for name, config in found.items()} == {
        "sift": 1, "smt": 100, "fish": 0, "child_tuning_d": 0,
    }  # fmt: skip
    assert {name: config.scope for name, config in found.items()} == {
        "sift": "tensor", "smt": "model", "fish": "model", "child_tuning_d": "model",
    }  # fmt: skip
    for name, chosen in {"self_attn.q_proj": True, "attention.self.value": True, "self_attn.o_proj": False}.items():
        assert bool(re.fullmatch(found["smt"].target_modules, f"layers.0.{name}")) is chosen
