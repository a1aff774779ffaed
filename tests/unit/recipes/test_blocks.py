"""LISA and BAdam do what plain torch does by their papers' descriptions."""

from __future__ import annotations

import pytest
import torch

from peft_dps.recipes import badam, lisa
from tests.unit.recipes.decoder import LAYERS, TARGETS, follow, make_model, make_step, micro_batches, selected

MICRO = pytest.mark.parametrize("micro", [1, 2])


def weights_of(layers: set[int]) -> set[str]:
    return {name for name in TARGETS if int(name.split(".")[1]) in layers}


def layers_of(weights: set[str]) -> set[int]:
    return {int(name.split(".")[1]) for name in weights}


@MICRO
@pytest.mark.parametrize("resume_after", [2, 3, 7])
def test_badam_trains_one_layer_after_the_other(micro, resume_after, tmp_path):
    def choose(plain, step, batches, found):
        if (step - 1) % 3 == 0:
            plain.choose(weights_of({(step - 1) // 3 % LAYERS}))

    config = badam(stage_steps=3)
    follow(config, choose, always=False, steps=16, micro=micro, resume_after=resume_after, folder=tmp_path)


def test_badam_steps_to_another_layer_at_each_step_if_told_to(tmp_path):
    def choose(plain, step, batches, found):
        plain.choose(weights_of({(step - 1) % LAYERS}))

    follow(badam(stage_steps=1), choose, always=False, steps=9, micro=1, resume_after=5, folder=tmp_path)


def test_the_optimizer_of_badam_has_state_of_one_layer():
    model, optimizer = make_model(badam(stage_steps=2))
    for step in range(1, 8):
        make_step(model, optimizer, micro_batches(step, 1))
        kept = [weight for weight, state in optimizer.state.items() if state]
        assert sum(weight.numel() for weight in kept) == 4 * 36 + 3 * 60
        assert {int(state["step"]) for state in optimizer.state.values()} == {2 - step % 2}


@MICRO
@pytest.mark.parametrize("resume_after", [2, 3, 7])
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
    assert badam(density=0.25).units is None
    assert (lisa().units, lisa().stage_steps, badam().units, badam().stage_steps) == (2, 20, 1, 100)
