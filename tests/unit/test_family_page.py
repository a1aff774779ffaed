"""The page on the family is what the recipes say."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks.compact_methods import RECIPES, Plan, find_method
from benchmarks.family import RESULTS
from benchmarks.family_page import DOCS, axes_of, draw, make_page, read
from benchmarks.models import make_batch
from benchmarks.settings import Settings
from peft_dps import DPSConfig, recipes


def test_the_committed_page_is_what_the_recipes_say():
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    assert (DOCS / "family.md").read_text(encoding="utf-8") == make_page(read(), document)


def test_every_recipe_is_on_the_page_and_in_the_picture():
    found = read()
    assert [each.name for each in found] == recipes.__all__
    labels = [label.get_text() for label in draw(found).axes[0].get_yticklabels()]
    assert labels == recipes.__all__


def test_every_recipe_is_on_the_page_of_the_api():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert re.findall(r"::: peft_dps\.recipes\.(\w+)\.\1\n", text) == recipes.__all__


def test_axes_are_told_as_the_configuration_says_them():
    told = axes_of(DPSConfig(variant="mix", stage_steps=7, density=0.25))
    assert (told["schedule"], told["how much"], told["the rest"]) == ("cycle, 7", "0.25", "columns")
    told = axes_of(DPSConfig.compact(units=4, score_steps=8))
    assert (told["schedule"], told["how much"], told["the rest"]) == ("once, 8", "4 units", "held")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_measured(name):
    plan = Plan(Settings(size="toy-pair", batch=2, tokens=8, dropout=0.0))
    torch.manual_seed(0)
    model = find_method(name).build(plan)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(4):  # as many as warm up
        model(**make_batch(plan.settings)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.dps_status().selected is not None or name == "recipe:mixout"
