"""Methods that select once without gradients, step by step against plain slow code."""

from __future__ import annotations

import re

import pytest
import torch

from peft_dps import recipes
from peft_dps.selection.scores import SCORES, LowRankResidual, register_score
from peft_dps.tuner.adapter import dps_adapter
from tests.unit.recipes.selective import (
    NAMES,
    Selective,
    best_entries_of_each,
    follow,
    make_net,
    resume,
)  # fmt: skip

pytestmark = pytest.mark.device

ALL = [f"blocks.{block}.{name}" for block in (0, 1) for name in NAMES]
TARGETS = {"target_modules": list(NAMES)}
RANDOM = {  # per recipe: fields to suit a small net, the layers that it selects from, and units selected of so many
    "random_mask": ({**TARGETS, "density": 0.3, "train_bias": False}, ALL, {64: 20, 96: 29}),
    "paca": ({**TARGETS, "units": 2}, ALL, {8: 2, 12: 2}),
    "s2ft": ({"density": 0.2}, [name for name in ALL if name.endswith(("o_proj", "down_proj"))], {8: 2, 12: 3}),
}
RANK = 2


@pytest.fixture
def low_rank():
    register_score("low_rank_residual_2", evidence="none")(LowRankResidual(RANK))
    yield "low_rank_residual_2"
    SCORES.unregister("low_rank_residual_2")


def nothing(_) -> None:
    """There is nothing to score."""


def left_by_low_rank(weight: torch.Tensor) -> torch.Tensor:
    """What the projection onto the main directions of its inputs leaves of a weight."""
    directions = torch.linalg.eigh(weight.t() @ weight).eigenvectors[:, -RANK:]
    return (weight - weight @ directions @ directions.t()).abs()


def ranked(score, **many):
    """A reference that selects entries by a score of the pretrained weights."""
    scores = {name: score(make_net().get_submodule(name).weight.detach()) for name in ALL}
    return Selective(make_net(), ALL, select=lambda _: best_entries_of_each(**many)(scores))


@pytest.mark.parametrize("storage", ["copy", "compact"])
def test_magnitude(storage):
    config = recipes.magnitude(**TARGETS, density=0.1, storage=storage, train_bias=False)
    follow(config, ranked(torch.abs, density=0.1), nothing)


def test_dsee(low_rank):
    follow(recipes.dsee(**TARGETS, score=low_rank, density=0.04), ranked(left_by_low_rank, density=0.04), nothing)


@pytest.mark.parametrize("name", RANDOM)
def test_random_units(name):
    fields, layers, counts = RANDOM[name]
    masks: dict[str, torch.Tensor] = {}
    reference = Selective(make_net(), layers, select=lambda _: masks)

    def take_masks(model) -> None:
        found = dps_adapter(model).masks()
        assert set(found) == set(layers)
        assert not masks or all(torch.equal(masks[layer], found[layer]) for layer in layers)
        masks.update(found)

    follow(getattr(recipes, name)(**fields), reference, nothing, take_masks)
    for mask in masks.values():
        if name == "random_mask":
            assert int(mask.sum()) == counts[mask.numel()]
        else:
            assert torch.equal(mask, mask[:1].expand_as(mask)), "columns"
            assert int(mask[0].sum()) == counts[mask.shape[1]]
    alike = [mask for mask in masks.values() if mask.shape == (8, 8)]
    assert any(not torch.equal(mask, alike[0]) for mask in alike), "drawn for each weight"


@pytest.mark.parametrize("name", ["magnitude", "dsee", "random_mask", "paca", "s2ft"])
def test_it_resumes_in_the_middle(name, tmp_path, low_rank):
    fields = {"magnitude": TARGETS, "dsee": {**TARGETS, "score": low_rank, "density": 0.04}}
    fields = fields.get(name) or RANDOM[name][0]
    resume(getattr(recipes, name)(**fields), tmp_path, nothing, stops=(2,))


def test_the_defaults_are_the_papers():
    found = {name: getattr(recipes, name)() for name in ("dsee", "paca", "s2ft")}
    assert {name: config.units for name, config in found.items()} == {"dsee": None, "paca": 16, "s2ft": None}
    assert SCORES.find(found["dsee"].score) == LowRankResidual(16)
    for name, chosen in {"0.self_attn.o_proj": True, "0.attention.output.dense": True, "0.mlp.up_proj": False}.items():
        assert bool(re.fullmatch(found["s2ft"].target_modules, f"layers.{name}")) is chosen
    assert {config.storage for config in found.values()} == {"compact"}
    assert recipes.paca(density=0.5).units is None
