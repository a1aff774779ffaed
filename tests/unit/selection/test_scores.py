from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from peft import get_peft_model

from peft_dps import DPSConfig, register_score
from peft_dps.errors import ConfigError
from peft_dps.selection import topk
from peft_dps.selection.scores import SCORES, LowRankResidual, ScoreContext, evidence_of
from peft_dps.selection.topk import SortableScores


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was():
    before = set(SCORES)
    yield
    for name in set(SCORES) - before:
        SCORES.unregister(name)


def select(scores: torch.Tensor, density: float) -> torch.Tensor:
    return topk.select([SortableScores.of(scores)], math.ceil(scores.numel() * density))[0]


def context(seed: int = 0, gathered: torch.Tensor | None = None, shape: tuple[int, ...] = (4, 5)) -> ScoreContext:
    weight = torch.zeros(shape)
    return ScoreContext(gathered, weight, lambda: weight, torch.Generator().manual_seed(seed))


def defined_in(module: str, name: str):
    """Make a score function as that module would define it."""

    def function(context: ScoreContext) -> torch.Tensor:
        return context.weight.abs()

    function.__module__, function.__qualname__ = module, name
    return function


# --- the registry ---


def test_the_built_in_scores_are_registered_with_the_evidence_they_are_made_from():
    assert {name: evidence_of(name) for name in SCORES} == {
        "squared_gradient": "squared_gradient",
        "absolute_gradient": "absolute_gradient",
        "random": "none",
        "movement": "none",
        "magnitude": "none",
        "low_rank_residual": "none",
        "in_turn": "none",
    }


@pytest.mark.parametrize("evidence", ["none", "squared_gradient", "second_moment"])
def test_registering_keeps_the_function_and_what_it_is_made_from(evidence):
    function = defined_in("mine", "largest")
    assert register_score("largest", evidence=evidence)(function) is function
    assert SCORES.find("largest") is function
    assert evidence_of("largest") == evidence


def test_a_score_is_made_from_squared_gradients_unless_told_otherwise():
    register_score("largest")(defined_in("mine", "largest"))
    assert evidence_of("largest") == "squared_gradient"


def test_registering_a_function_again_replaces_it_as_a_notebook_cell_does():
    register_score("largest")(defined_in("__main__", "largest"))
    edited = defined_in("__main__", "largest")
    register_score("largest")(edited)
    assert SCORES.find("largest") is edited


@pytest.mark.parametrize("other", [("mine", "size"), ("yours", "largest")])
def test_a_name_taken_by_another_function_is_refused_and_kept(other):
    first = defined_in("mine", "largest")
    register_score("largest")(first)
    with pytest.raises(ConfigError, match=r"`score='largest'` is taken by mine\.largest; use another name"):
        register_score("largest")(defined_in(*other))
    assert SCORES.find("largest") is first


def test_a_users_function_called_random_does_not_replace_the_baseline():
    with pytest.raises(ConfigError, match=r"`score='random'` is taken by peft_dps\.selection\.scores\.random"):
        register_score("random")(defined_in("mine", "random"))


# --- from evidence ---


@pytest.mark.parametrize("name", ["squared_gradient", "absolute_gradient"])
def test_a_score_of_gradients_is_what_was_gathered(name):
    gathered = torch.rand(4, 5)
    assert SCORES.find(name)(context(gathered=gathered)) is gathered


@pytest.mark.parametrize("name", ["squared_gradient", "absolute_gradient"])
def test_a_score_of_gradients_without_evidence_is_an_error(name):
    with pytest.raises(ConfigError, match="looks at evidence, and none is gathered for it"):
        SCORES.find(name)(context())


# --- random ---


def test_random_scores_come_from_their_generator_alone():
    random = SCORES.find("random")
    first = random(context(seed=3))
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(random(context(seed=3)), first)
    assert not torch.equal(random(context(seed=4)), first)


def test_random_scores_leave_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    SCORES.find("random")(context())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_scores_select_every_entry_equally_often():
    shape = (8, 8)
    hits = sum(select(SCORES.find("random")(context(seed=seed, shape=shape)), 0.25).double() for seed in range(400))
    assert hits.sum() == 400 * 16
    assert (hits - 100).abs().max() < 6 * (400 * 0.25 * 0.75) ** 0.5


def test_random_scores_are_fp32_of_the_weights_shape():
    scores = SCORES.find("random")(context(shape=(3, 2, 2)))
    assert (scores.shape, scores.dtype) == ((3, 2, 2), torch.float32)
    assert bool((scores >= 0).all())


# --- from the pretrained weight ---


def test_magnitude_is_that_of_the_pretrained_weight():
    base = torch.randn(5, 4).to(torch.bfloat16)
    given = ScoreContext(None, torch.zeros(5, 4), lambda: base, torch.Generator())
    assert torch.equal(SCORES.find("magnitude")(given), base.float().abs())


def test_a_low_rank_residual_is_what_the_best_approximation_leaves():
    base = torch.randn(40, 30, dtype=torch.float64)
    found = SCORES.find("low_rank_residual")(ScoreContext(None, base, lambda: base, torch.Generator()))
    directions = torch.linalg.eigh(base.t() @ base).eigenvectors[:, -16:]
    torch.testing.assert_close(found, (base - base @ directions @ directions.t()).abs(), rtol=1e-9, atol=1e-12)


def test_a_sparse_part_on_a_low_rank_is_found():
    low = torch.randn(40, 2) @ torch.randn(2, 30)
    low[3, 7] += 5.0
    scores = LowRankResidual(2)(ScoreContext(None, low, lambda: low, torch.Generator()))
    assert int(scores.argmax()) == 3 * 30 + 7


def test_a_convolution_is_a_matrix_of_its_output_channels():
    base = torch.randn(6, 4, 3)
    flat = base.view(6, 12)
    own, other = (LowRankResidual(2)(ScoreContext(None, w, lambda w=w: w, torch.Generator())) for w in (base, flat))
    assert torch.equal(own, other.view(6, 4, 3))


# --- a user's score, from the config to the mask ---


@pytest.mark.parametrize("units", [1, 2])
def test_units_take_turns_in_ascending_order(units):
    for selection in range(1, 12):
        scores = []
        for place in range(4):
            own = dataclasses.replace(context(shape=(2, 3)), selection=selection, place=place, places=4)
            values = SCORES.find("in_turn")(own)
            assert (values.shape, values.dtype, values.unique().numel()) == ((2, 3), torch.float32, 1)
            assert values.min() > 0
            scores.append(float(values[0, 0]))
        best = sorted(range(4), key=lambda place: -scores[place])[:units]
        assert best == [(selection - 1 + further) % 4 for further in range(units)]


def train_to_selection(score: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 4)),
        DPSConfig(target_modules=["0"], score=score, stage_steps=1, density=0.25),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 6)).pow(2).sum().backward()
        optimizer.step()
    return model


def test_a_users_score_of_one_function_selects_the_subnetwork():
    seen = []

    @register_score("largest_change", evidence="none")
    def largest_change(context: ScoreContext) -> torch.Tensor:
        seen.append(context)
        return (context.weight - context.base_weight).abs()

    model = train_to_selection("largest_change")

    assert len(seen) == 1
    assert seen[0].gathered is None
    layer = model.base_model.model[0]
    # The first step moves every entry, the second only the selected ones: those have another change afterwards.
    after_one_step = get_reference_change()
    expected = select(after_one_step, 0.25)
    moved = layer.dps_weight["default"].detach() - layer.base_layer.weight
    assert torch.equal(~torch.isclose(moved.abs(), after_one_step, rtol=1e-6, atol=1e-7), expected)
    assert model.dps_status().selected == 6


def get_reference_change() -> torch.Tensor:
    """Change of the weight after one SGD step of `train_to_selection`, by plain torch."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    layer(torch.ones(3, 6)).pow(2).sum().backward()
    return (layer.weight.detach() - 0.1 * layer.weight.grad - before).abs()


def test_a_score_that_uses_gradients_is_given_their_squares():
    @register_score("root")
    def root(context: ScoreContext) -> torch.Tensor:
        assert context.gathered is not None
        assert context.evidence.sum() > 0
        return context.evidence.sqrt()

    assert train_to_selection("root").dps_status().selected == 6


@pytest.mark.parametrize(
    ("result", "found"), [(None, "NoneType"), (1.0, "float"), (torch.ones(4, 6, dtype=torch.bool), "dtype torch.bool")]
)
def test_a_score_that_returns_no_floats_is_named(result, found):
    register_score("mine")(lambda context: result)
    with pytest.raises(ConfigError, match=rf"The score 'mine' returned {found} for the weight of '0'; .* of floats"):
        train_to_selection("mine")


def test_an_unknown_score_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match=f"`score` must be one of {', '.join(map(repr, SCORES))}, got 'fisher'"):
        DPSConfig(score="fisher")


@pytest.mark.parametrize("shape", [(6, 4), (4,), ()])
def test_a_score_of_another_shape_is_named(shape):
    register_score("mine")(lambda context: torch.ones(shape))
    message = rf"The score 'mine' returned shape \({', '.join(map(str, shape))},?\) on cpu .*must be \(4, 6\) on cpu"
    with pytest.raises(ConfigError, match=message):
        train_to_selection("mine")


@pytest.mark.parametrize(("dtype", "base_dtype"), [(torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_movement_is_how_far_an_entry_is_from_its_pretrained_value(dtype, base_dtype):
    base = torch.randn(4, 5).to(base_dtype)
    weight = (base + torch.randn(4, 5)).to(dtype)
    scores = SCORES.find("movement")(ScoreContext(None, weight, lambda: base, torch.Generator()))
    assert scores.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert torch.equal(scores, (weight.to(scores.dtype) - base.to(scores.dtype)).abs())
    assert scores.max() > 0
