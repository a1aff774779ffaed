"""BAdam does what plain torch does by its paper's description."""

from __future__ import annotations

import pytest

from peft_dps.recipes import badam
from tests.unit.recipes.decoder import LAYERS, follow, make_model, make_step, micro_batches, weights_of

pytestmark = pytest.mark.device


@pytest.mark.parametrize(("micro", "resume_after"), [(1, 2), (2, 3), (1, 7)])
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


def test_a_density_takes_the_place_of_units():
    assert badam(density=0.25).units is None
    assert (badam().units, badam().stage_steps) == (1, 100)
