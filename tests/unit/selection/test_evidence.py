from __future__ import annotations

import pytest
import torch

from peft_dps.errors import ConfigError
from peft_dps.selection.evidence import EVIDENCE, AbsoluteGradients, Evidence, SquaredGradients, are_finite


def accumulate_squares_(totals, gradients, scale=1.0):
    SquaredGradients().add_(totals, gradients, scale)


# --- dtypes ---


@pytest.mark.parametrize("name", ["squared_gradient", "absolute_gradient"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_kept_in_fp32(name, dtype):
    assert EVIDENCE.find(name)("float32").dtype_for(torch.zeros(2, dtype=dtype)) is torch.float32


def test_sums_of_an_fp64_weight_are_kept_in_fp64():
    assert SquaredGradients().dtype_for(torch.zeros(2, dtype=torch.float64)) is torch.float64


@pytest.mark.parametrize("dtype", ["float16", torch.float32, None, ["float32"]])
def test_other_dtypes_are_refused_by_field_and_value(dtype):
    with pytest.raises(ConfigError, match="`score_dtype` must be one of 'float32', 'bfloat16', got"):
        SquaredGradients(dtype)


def test_no_evidence_looks_at_nothing():
    evidence = Evidence()
    assert not evidence.looks
    assert evidence.dtype_for(torch.zeros(2)) is None
    assert evidence.begin().is_empty
    assert evidence.begin().value(None) is None


# --- squared gradients ---


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
def test_sums_in_bf16_are_rounded_once_a_step(dtype):
    assert SquaredGradients("bfloat16").dtype_for(torch.zeros(2, dtype=dtype)) is torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    size = 3 * 2**15 + 5  # several pieces on a CPU
    total, expected = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
    for _ in range(5):
        gradient = torch.randn(size, generator=generator).to(dtype)
        accumulate_squares_([total], [gradient], scale=2.0)
        wide = gradient.float()
        expected = torch.addcmul(expected.float(), wide, wide, value=0.25).bfloat16()
    assert torch.equal(total, expected)


def test_sums_in_bf16_of_a_weight_that_is_no_flat_piece_of_memory():
    gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).t()
    totals = [torch.zeros(5, 6, dtype=torch.bfloat16), torch.zeros(6, 5, dtype=torch.bfloat16).t()]
    for total in totals:
        accumulate_squares_([total], [gradient])
    assert torch.equal(*totals)
    assert torch.equal(totals[0], (gradient * gradient).bfloat16())


def test_squares_of_fp64_gradients_stay_exact():
    gradient = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64)
    accumulate_squares_([total], [gradient])
    assert total.item() == gradient.item() ** 2
    assert total.item() != 1.0


def test_several_weights_are_added_in_place_and_gradients_left_alone():
    totals = [torch.ones(2, 3), torch.ones(4)]
    gradients = [torch.full((2, 3), 2.0), torch.full((4,), -3.0)]
    accumulate_squares_(totals, gradients)
    assert [total.unique().tolist() for total in totals] == [[5.0], [10.0]]
    assert [gradient.unique().tolist() for gradient in gradients] == [[2.0], [-3.0]]


def test_different_numbers_of_sums_and_gradients_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        accumulate_squares_([torch.zeros(1)], [])


def test_adding_keeps_no_graph():
    gradient = torch.ones(2, requires_grad=True)
    total = torch.zeros(2)
    accumulate_squares_([total], [gradient])
    assert not total.requires_grad


# --- absolute gradients ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
def test_absolute_gradients_add_up_where_squares_underflow(dtype, score_dtype):
    evidence = AbsoluteGradients(score_dtype)
    gradient = torch.tensor([[2.0**-14, -3.0], [0.0, -0.25]]).to(dtype)
    total = torch.zeros(2, 2, dtype=evidence.dtype_for(gradient))
    for _ in range(4):
        evidence.add_([total], [gradient], 2.0)
    assert torch.equal(total, torch.tensor([[2.0**-13, 6.0], [0.0, 0.5]]).to(total.dtype))
    assert gradient[0, 1] == -3.0


# --- finite or not ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_entry_that_is_not_finite_is_found(dtype, contiguous, value):
    gradients = [torch.ones(3, 4, dtype=dtype), torch.ones(6, 5, dtype=dtype)]
    gradients = [gradient if contiguous else gradient.t() for gradient in gradients]
    assert are_finite(gradients)
    gradients[1][2, 3] = value
    assert not are_finite(gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_whose_squares_overflow_are_finite(dtype):
    gradient = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert are_finite([gradient])
    gradient[0, 0] = float("inf")
    assert not are_finite([gradient])
