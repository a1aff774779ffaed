from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_dps import DPSConfig, Evidence, register_score
from peft_dps.errors import ConfigError
from peft_dps.selection.scores import SCORES, accumulate_squares_, are_finite, score_dtype
from peft_dps.selection.topk import select


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was():
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


def evidence(seed: int = 0, squares: torch.Tensor | None = None, shape: tuple[int, ...] = (4, 5)) -> Evidence:
    weight = torch.zeros(shape)
    return Evidence(squares, weight, weight, torch.Generator().manual_seed(seed))


def defined_in(module: str, name: str):
    """Make a score function as that module would define it."""

    def function(evidence: Evidence) -> torch.Tensor:
        return evidence.weight.abs()

    function.__module__, function.__qualname__ = module, name
    return function


# --- the registry ---


def test_the_built_in_scores_are_registered_with_what_they_need():
    assert {name: score.uses_gradients for name, score in SCORES.items()} == {
        "squared_gradient": True,
        "random": False,
    }


@pytest.mark.parametrize("uses_gradients", [True, False])
def test_registering_keeps_the_function_and_what_it_needs(uses_gradients):
    function = defined_in("mine", "magnitude")
    assert register_score("magnitude", uses_gradients=uses_gradients)(function) is function
    score = SCORES["magnitude"]
    assert (score.name, score.function, score.uses_gradients) == ("magnitude", function, uses_gradients)


def test_a_score_uses_gradients_unless_told_otherwise():
    register_score("magnitude")(defined_in("mine", "magnitude"))
    assert SCORES["magnitude"].uses_gradients


def test_registering_a_function_again_replaces_it_as_a_notebook_cell_does():
    register_score("magnitude")(defined_in("__main__", "magnitude"))
    edited = defined_in("__main__", "magnitude")
    register_score("magnitude")(edited)
    assert SCORES["magnitude"].function is edited


@pytest.mark.parametrize("other", [("mine", "size"), ("yours", "magnitude")])
def test_a_name_taken_by_another_function_is_refused_and_kept(other):
    first = defined_in("mine", "magnitude")
    register_score("magnitude")(first)
    with pytest.raises(ConfigError, match=r"score name 'magnitude' is taken by mine\.magnitude; use another name"):
        register_score("magnitude")(defined_in(*other))
    assert SCORES["magnitude"].function is first


def test_a_users_function_called_random_does_not_replace_the_baseline():
    with pytest.raises(ConfigError, match=r"'random' is taken by peft_dps\.scores\.random"):
        register_score("random")(defined_in("mine", "random"))


# --- squared gradients ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_kept_in_fp32(dtype):
    assert score_dtype(torch.zeros(2, dtype=dtype)) is torch.float32


def test_scores_of_an_fp64_weight_are_kept_in_fp64():
    assert score_dtype(torch.zeros(2, dtype=torch.float64)) is torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_squares_add_up_in_fp32_whatever_the_gradient(dtype):
    # Squares of these underflow in fp16, and 300 of them stagnate in bf16.
    gradient = torch.tensor([1e-5, 3.0, -0.01, 0.0]).to(dtype)
    total = torch.zeros(4)
    for _ in range(300):
        accumulate_squares_([total], [gradient])
    assert total.dtype is torch.float32
    torch.testing.assert_close(total, (300 * gradient.double() ** 2).float(), rtol=1e-4, atol=0.0)
    assert total[0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scores_in_bf16_are_rounded_once_a_step(dtype):
    assert score_dtype(torch.zeros(2, dtype=dtype), "bfloat16") is torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    size = 3 * 2**15 + 5  # several pieces on a CPU
    total, expected = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
    for _ in range(5):
        gradient = torch.randn(size, generator=generator).to(dtype)
        accumulate_squares_([total], [gradient], scale=2.0)
        wide = gradient.float()
        expected = torch.addcmul(expected.float(), wide, wide, value=0.25).bfloat16()
    assert torch.equal(total, expected)


def test_scores_in_bf16_of_a_weight_that_is_no_flat_piece_of_memory():
    gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).t()
    totals = [torch.zeros(5, 6, dtype=torch.bfloat16), torch.zeros(6, 5, dtype=torch.bfloat16).t()]
    for total in totals:
        accumulate_squares_([total], [gradient])
    assert torch.equal(*totals)
    assert torch.equal(totals[0], (gradient * gradient).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_entry_that_is_not_finite_is_found(dtype, contiguous, value):
    gradients = [torch.ones(3, 4, dtype=dtype), torch.ones(6, 5, dtype=dtype)]
    gradients = [gradient if contiguous else gradient.t() for gradient in gradients]
    assert are_finite(gradients)
    gradients[1][2, 3] = value
    assert not are_finite(gradients)


def test_squares_of_fp64_gradients_stay_exact():
    gradient = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64)
    accumulate_squares_([total], [gradient])
    assert total.item() == gradient.item() ** 2
    assert total.item() != 1.0


def test_several_weights_are_accumulated_in_place_and_gradients_left_alone():
    totals = [torch.ones(2, 3), torch.ones(4)]
    gradients = [torch.full((2, 3), 2.0), torch.full((4,), -3.0)]
    accumulate_squares_(totals, gradients)
    assert [total.unique().tolist() for total in totals] == [[5.0], [10.0]]
    assert [gradient.unique().tolist() for gradient in gradients] == [[2.0], [-3.0]]


def test_accumulation_of_different_numbers_of_weights_and_gradients_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        accumulate_squares_([torch.zeros(1)], [])


def test_accumulation_keeps_no_graph():
    gradient = torch.ones(2, requires_grad=True)
    total = torch.zeros(2)
    accumulate_squares_([total], [gradient])
    assert not total.requires_grad


def test_the_squared_gradient_score_is_what_was_accumulated():
    squares = torch.rand(4, 5)
    assert SCORES["squared_gradient"].function(evidence(squares=squares)) is squares


def test_the_squared_gradient_score_without_gradients_is_an_error():
    with pytest.raises(ConfigError, match="'squared_gradient' needs accumulated gradients"):
        SCORES["squared_gradient"].function(evidence())


# --- random ---


def test_random_scores_come_from_their_generator_alone():
    random = SCORES["random"].function
    first = random(evidence(seed=3))
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(random(evidence(seed=3)), first)
    assert not torch.equal(random(evidence(seed=4)), first)


def test_random_scores_leave_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    SCORES["random"].function(evidence())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_scores_select_every_entry_equally_often():
    shape = (8, 8)
    hits = sum(
        select(SCORES["random"].function(evidence(seed=seed, shape=shape)), 0.25).double() for seed in range(400)
    )
    assert hits.sum() == 400 * 16
    assert (hits - 100).abs().max() < 6 * (400 * 0.25 * 0.75) ** 0.5


def test_random_scores_are_fp32_of_the_weights_shape():
    scores = SCORES["random"].function(evidence(shape=(3, 2, 2)))
    assert (scores.shape, scores.dtype) == ((3, 2, 2), torch.float32)
    assert bool((scores >= 0).all())


# --- a user's score, from the config to the mask ---


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

    @register_score("largest_change", uses_gradients=False)
    def largest_change(evidence: Evidence) -> torch.Tensor:
        seen.append(evidence)
        return (evidence.weight - evidence.base_weight).abs()

    model = train_to_selection("largest_change")

    assert len(seen) == 1
    assert seen[0].squared_gradients is None
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
    def root(evidence: Evidence) -> torch.Tensor:
        assert evidence.squared_gradients is not None
        assert evidence.squared_gradients.sum() > 0
        return evidence.squared_gradients.sqrt()

    assert train_to_selection("root").dps_status().selected == 6


@pytest.mark.parametrize(
    ("result", "found"), [(None, "NoneType"), (1.0, "float"), (torch.ones(4, 6, dtype=torch.bool), "dtype torch.bool")]
)
def test_a_score_that_returns_no_floats_is_named(result, found):
    register_score("mine")(lambda evidence: result)
    with pytest.raises(ConfigError, match=rf"The score 'mine' returned {found} for the weight of '0'; .* of floats"):
        train_to_selection("mine")


def test_an_unknown_score_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match="`score` must be one of 'squared_gradient', 'random', got 'fisher'"):
        DPSConfig(score="fisher")
