"""HFT does what plain torch does by its paper's description."""

from __future__ import annotations

import pytest
import torch

from peft_dps.recipes import hft
from tests.device import DEVICE
from tests.unit.recipes.decoder import ATTENTION, FEED_FORWARD, LAYERS, TARGETS, follow, make_model, selected

pytestmark = pytest.mark.device

MICRO = pytest.mark.parametrize("micro", [1, 2])


def counts_of(chosen: set[str], parts: tuple[str, ...]) -> list[int]:
    return [sum(f"layers.{number}.{part}" in chosen for part in parts) for number in range(LAYERS)]


@MICRO
def test_hft_trains_half_of_each_category(micro, tmp_path):
    def choose(plain, step, batches, found):
        if step == 1:
            assert counts_of(found, ATTENTION) == [2] * LAYERS
            assert sorted(counts_of(found, FEED_FORWARD)) == [1] * (LAYERS // 2) + [2] * (LAYERS // 2)
            plain.choose(found)

    follow(hft(seed=3), choose, always=True, steps=5, micro=micro, resume_after=3, folder=tmp_path)


def test_hft_without_the_rest(tmp_path):
    def choose(plain, step, batches, found):
        plain.choose(found)

    config = hft(train_remaining=False)
    follow(config, choose, always=False, steps=3, micro=1, resume_after=2, folder=tmp_path)


def test_hft_trains_another_half_with_another_seed_and_each_weight_in_half_of_them():
    trained, layers_with_two = dict.fromkeys(TARGETS, 0), set()
    for seed in range(24):
        model, _ = make_model(hft(seed=seed, train_remaining=False))
        model(torch.zeros(1, 2, dtype=torch.long, device=DEVICE))
        found = selected(model)
        for name in found:
            trained[name] += 1
        layers_with_two.add(tuple(counts_of(found, FEED_FORWARD)))
    assert 3 < min(trained.values()) < max(trained.values()) < 21
    assert len(layers_with_two) > 3, "of six pairs of layers"
