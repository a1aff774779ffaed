from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dps.errors import ScoreError
from peft_dps.selection import topk
from peft_dps.selection.topk import SortableScores, check_one_dtype, select_within

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}

densities = st.floats(0.0, 1.0, exclude_min=True)
# Few different values make ties; the rest are drawn over the whole range.
scores_with_ties = st.sampled_from([0.0, -0.0, 1e-45, 3e-45, 1e-38, 0.5, 1.0, 1.0 + 2**-23, 3.0, math.inf])
scores_of_any_size = st.floats(0.0, math.inf, width=32)
values = st.one_of(
    st.lists(scores_with_ties, max_size=60),
    st.lists(scores_of_any_size, max_size=60),
    st.lists(st.one_of(scores_with_ties, scores_of_any_size), max_size=60),
)


def oracle(weights: list[list[float]], density: float) -> list[list[bool]]:
    """Sort all entries by score, best first, equal ones by weight and index; take the first ceil(n * density)."""
    entries = [(-score, w, i) for w, scores in enumerate(weights) for i, score in enumerate(scores)]
    best = {(w, i) for _, w, i in sorted(entries)[: math.ceil(len(entries) * density)]}
    return [[(w, i) in best for i in range(len(scores))] for w, scores in enumerate(weights)]


def expected_mask(scores: torch.Tensor, density: float) -> torch.Tensor:
    (mask,) = oracle([scores.reshape(-1).tolist()], density)
    return torch.tensor(mask, dtype=torch.bool).view(scores.shape)


def select_across(weights: list[torch.Tensor], density: float) -> list[torch.Tensor]:
    """Select ceil(n * density) entries of all weights together."""
    scores = [SortableScores.of(weight) for weight in weights]
    return topk.select(scores, math.ceil(sum(weight.numel() for weight in weights) * density))


def select(scores: torch.Tensor, density: float) -> torch.Tensor:
    return select_across([scores], density)[0]


@pytest.fixture(params=[7, 1 << 18], ids=["many chunks", "one chunk"])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(topk, "_CPU_CHUNK", request.param)


# --- against the oracle ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(values, densities)
@settings(max_examples=80, deadline=None)
@example([0.0, -0.0, 0.0, -0.0], 0.5)
@example([math.inf, 1.0, math.inf], 0.3)
def test_selects_what_sorting_would(dtype, scores, density):
    scores = torch.tensor(scores, dtype=torch.float32).to(dtype)
    mask = select(scores, density)
    assert mask.dtype is torch.bool
    assert torch.equal(mask, expected_mask(scores, density))
    assert int(mask.sum()) == math.ceil(scores.numel() * density)


@given(st.lists(st.floats(0.0, math.inf), max_size=40), densities)
@settings(max_examples=80, deadline=None)
def test_selects_what_sorting_would_over_all_of_fp64(scores, density):
    scores = torch.tensor(scores, dtype=torch.float64)
    assert torch.equal(select(scores, density), expected_mask(scores, density))


@given(st.lists(st.integers(0, 0x7C00), min_size=1, max_size=40), densities)
@settings(max_examples=80, deadline=None)
def test_selects_what_sorting_would_over_all_of_fp16(bits, density):
    scores = torch.tensor(bits, dtype=torch.int16).view(torch.float16)
    assert torch.equal(select(scores, density), expected_mask(scores, density))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_show(dtype, density):
    scores = torch.randint(0, 5, (6, 50)).to(dtype) * torch.rand(300).round(decimals=1).to(dtype).view(6, 50)
    assert torch.equal(select(scores, density), expected_mask(scores, density))


@given(st.lists(st.lists(scores_with_ties, max_size=15), max_size=5), densities)
@settings(max_examples=120, deadline=None)
@example([[], [1.0], []], 1.0)
@example([[1.0, 1.0], [], [1.0, 2.0]], 0.5)
def test_selects_across_weights_what_sorting_all_of_them_would(weights, density):
    weights = [torch.tensor(scores, dtype=torch.float32) for scores in weights]
    masks = select_across(weights, density)
    assert [mask.tolist() for mask in masks] == oracle([scores.tolist() for scores in weights], density)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_across_weights_go_to_the_first_weights(dtype):
    masks = select_across(
        [torch.ones(4, 5, dtype=dtype), torch.ones(0, 3, dtype=dtype), torch.ones(10).to(dtype)], 0.8
    )
    assert [int(mask.sum()) for mask in masks] == [20, 0, 4]
    assert masks[2].tolist() == [True] * 4 + [False] * 6


def test_selecting_across_nothing_is_nothing():
    assert select_across([], 0.5) == []


# --- special values ---


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_are_taken_from_the_front(dtype, value):
    mask = select(torch.full((5, 6), value, dtype=dtype), 0.4)
    assert mask.view(-1).tolist() == [True] * 12 + [False] * 18


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormals_are_told_apart_and_better_than_zero(dtype):
    tiny = torch.tensor([0, 1, 2, 3, 0], dtype=torch.float64)
    scores = (tiny * SMALLEST[dtype]).to(dtype)
    assert select(scores, 0.2).tolist() == [False, False, False, True, False]
    assert select(scores, 0.6).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_is_better_than_the_largest_number(dtype):
    largest = torch.finfo(dtype).max
    scores = torch.tensor([largest, math.inf, largest], dtype=dtype)
    assert select(scores, 0.3).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_zero_is_zero(dtype):
    scores = torch.tensor([-0.0, 0.0, SMALLEST[dtype], -0.0], dtype=dtype)
    assert select(scores, 0.5).tolist() == [True, False, True, False]
    assert math.copysign(1.0, float(scores[0])) == -1.0  # the scores themselves are not touched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_refused_with_how_many_there_are(dtype):
    scores = torch.tensor([1.0, math.nan, -math.nan, 2.0], dtype=dtype)
    with pytest.raises(ScoreError, match="2 of 4 scores are NaN"):
        select(scores, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_the_smallest_payload_is_not_taken_for_infinity(dtype):
    scores = torch.tensor([1.0, math.inf], dtype=dtype)
    scores.view(BITS[dtype])[1] += 1
    assert bool(scores.isnan()[1])
    with pytest.raises(ScoreError, match="1 of 2 scores are NaN"):
        select(scores, 0.5)


@pytest.mark.parametrize("lowest", [-math.inf, -2.0, "subnormal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_negative_score_is_refused_with_its_value(dtype, lowest):
    lowest = -SMALLEST[dtype] if lowest == "subnormal" else lowest
    scores = torch.tensor([1.0, lowest, 2.0], dtype=dtype)
    with pytest.raises(ScoreError, match=f"must not be negative, got {lowest}"):
        select(scores, 0.5)


def test_every_weight_is_checked():
    with pytest.raises(ScoreError, match="1 of 2 scores are NaN"):
        select_across([torch.ones(3), torch.tensor([0.0, math.nan])], 0.1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ScoreError, match=f"must be fp16, bf16, fp32 or fp64, got {dtype}"):
        select(torch.zeros(3).to(dtype), 0.5)


def test_different_dtypes_cannot_be_ranked_together():
    scores = [SortableScores.of(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for rank in (
        lambda: topk.select(scores, 2),
        lambda: select_within(scores, [1, 1], 2),
        lambda: check_one_dtype(scores),
    ):
        with pytest.raises(ScoreError, match=r"one dtype, got torch\.float32, torch\.float64"):
            rank()


# --- within what they cost ---


def within(weights: list[list[float]], costs: list[int], limit: float) -> list[list[bool]]:
    """Take the best of all, of equal ones the first, as long as those before it cost less than the limit."""
    entries = sorted((-score, w, i) for w, scores in enumerate(weights) for i, score in enumerate(scores))
    chosen, spent = set(), 0
    for _, w, i in entries:
        if spent < limit:
            chosen.add((w, i))
        spent += costs[w]
    return [[(w, i) in chosen for i in range(len(scores))] for w, scores in enumerate(weights)]


@given(
    st.lists(st.tuples(st.lists(scores_with_ties, max_size=8), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 120),
)
@settings(max_examples=150, deadline=None)
@example([([1.0, 1.0], 3), ([1.0], 3)], 4)
@example([([0.0, -0.0], 3), ([2.0], 5)], 5)
def test_the_best_are_taken_until_their_costs_reach_the_limit(weights, limit):
    costs = [cost for _, cost in weights]
    scores = [torch.tensor(each, dtype=torch.float64) for each, _ in weights]
    masks = select_within([SortableScores.of(each) for each in scores], costs, limit)
    assert [mask.tolist() for mask in masks] == within([each.tolist() for each in scores], costs, limit)


# --- shapes and layouts ---


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 2)])
def test_an_empty_weight_gets_an_empty_mask(shape):
    mask = select(torch.zeros(shape), 0.5)
    assert (mask.shape, mask.dtype) == (shape, torch.bool)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_entry_is_always_selected(shape):
    mask = select(torch.zeros(shape), 1e-6)
    assert mask.shape == shape
    assert bool(mask.all())


def layouts() -> dict[str, torch.Tensor]:
    tied = torch.arange(96).remainder(5).float()
    return {
        "transposed": tied.view(8, 12).t(),
        "every other column": tied.view(8, 12)[:, ::2],
        "channels_last": tied.view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "permuted": tied.view(2, 6, 8).permute(2, 0, 1),
        "expanded": torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 4),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_row_major_means_the_logical_index_whatever_the_layout(layout, density):
    scores = layouts()[layout]
    assert not scores.is_contiguous()
    assert torch.equal(select(scores, density), expected_mask(scores, density))


def test_scores_are_left_as_they_were_and_may_require_grad():
    scores = torch.tensor([3.0, -0.0, 1.0], requires_grad=True)
    mask = select(scores, 0.4)
    assert mask.tolist() == [True, False, True]
    assert scores.tolist() == [3.0, 0.0, 1.0]
    assert scores.signbit().tolist() == [False, True, False]


# --- cost ---


class OpCounter(TorchDispatchMode):
    """Counts the aten operations and the entries that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        self.entries += sum(arg.numel() for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **(kwargs or {}))


def count_ops(scores: torch.Tensor) -> OpCounter:
    with OpCounter() as counter:
        select(scores, 0.7)
    return counter


SCORES_OF_SIZE = {
    "continuous": torch.rand,
    "mostly zero": lambda n: torch.rand(n) * (torch.rand(n) < 0.3),
    "minus zero": lambda n: torch.full((n,), -0.0),
    "all equal": torch.ones,
}


@pytest.mark.parametrize("kind", SCORES_OF_SIZE)
def test_nothing_sorts(kind):
    calls = count_ops(SCORES_OF_SIZE[kind](1000)).calls
    assert calls["bincount"] == 2  # the counter works, and fp32 takes two digits
    assert not {"sort", "argsort", "topk", "kthvalue", "msort", "median", "quantile", "unique_dim", "_unique2"} & set(
        calls
    )


def test_scores_without_ties_need_no_search_for_the_first_of_the_ties():
    assert "count_nonzero" not in count_ops(torch.arange(1000.0)).calls
    assert "count_nonzero" in count_ops(torch.ones(1000)).calls


@pytest.mark.parametrize("kind", SCORES_OF_SIZE)
def test_work_grows_linearly_with_the_entries(kind, monkeypatch):
    monkeypatch.setattr(topk, "_CPU_CHUNK", 1 << 10)
    counters = [count_ops(SCORES_OF_SIZE[kind](chunks << 10)) for chunks in (32, 64, 128)]
    for cost in ([sum(counter.calls.values()) for counter in counters], [counter.entries for counter in counters]):
        # 64 more chunks cost twice what 32 more do; squares would cost four times as much.
        assert 0 < cost[2] - cost[1] <= 2.2 * (cost[1] - cost[0])
