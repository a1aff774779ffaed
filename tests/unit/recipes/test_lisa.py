"""LISA does what plain torch does by its paper's description."""

from __future__ import annotations

import pytest
import torch

from peft_dps.recipes import lisa
from tests.unit.recipes.decoder import (
    LAYERS,
    follow,
    layers_of,
    make_model,
    make_step,
    micro_batches,
    selected,
    weights_of,
)

pytestmark = pytest.mark.device


@pytest.mark.parametrize(("micro", "resume_after"), [(1, 2), (2, 3), (1, 7)])
def test_lisa_trains_some_layers_and_the_rest_always(micro, resume_after, tmp_path):
    seen = []

    def choose(plain, step, batches, found):
        if (step - 1) % 3 == 0:
            layers = layers_of(found)
            assert len(layers) == 2
            plain.choose(weights_of(layers))
            seen.append(tuple(sorted(layers)))

    config = lisa(stage_steps=3, seed=5)
    follow(config, choose, always=True, steps=16, micro=micro, resume_after=resume_after, folder=tmp_path)
    assert len(set(seen)) > 2, "the layers change"


def test_lisa_draws_each_layer_as_often_whatever_the_seed():
    drawn, sequences = torch.zeros(LAYERS), set()
    for seed in range(2):
        model, optimizer = make_model(lisa(stage_steps=1, seed=seed, train_remaining=False))
        sequence = []
        for step in range(1, 41):
            make_step(model, optimizer, micro_batches(step, 1))
            layers = layers_of(selected(model))
            sequence.append(tuple(layers))
            for number in layers:
                drawn[number] += 1
        sequences.add(tuple(sequence))
    assert len(sequences) == 2
    assert drawn.sum() == 2 * 40 * 2
    assert (drawn - 40).abs().max() < 18, "four standard deviations"


def test_a_density_takes_the_place_of_units():
    assert lisa(density=0.5).units is None
    assert (lisa().units, lisa().stage_steps) == (2, 20)
