from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dps.selection.sharded_topk import select_sharded
from peft_dps.selection.topk import SortableScores, select


class Group:
    """Ranks as threads of one process; it keeps what was communicated."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = Barrier(size, timeout=60)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * size
        self.sent: list[torch.Tensor] = []

    def run(self, work):
        with ThreadPoolExecutor(self.size) as pool:
            return [job.result() for job in [pool.submit(work, Rank(self, rank)) for rank in range(self.size)]]


class Rank:
    def __init__(self, group: Group, rank: int) -> None:
        self.group = group
        self.rank = rank

    def gather(self, part):
        self.group.slots[self.rank] = part
        if self.rank == 0:
            self.group.sent.append(part)
        self.group.barrier.wait()
        gathered = torch.stack(self.group.slots)
        self.group.barrier.wait()
        return gathered

    def sum(self, counts):
        return self.gather(counts).sum(0)


def cut(whole: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Rows as FSDP2 gives them to the ranks, some of which may get none."""
    parts = list(whole.chunk(size))
    return parts + [whole[:0]] * (size - len(parts))


def ranked(weights: list[torch.Tensor], density: float, *, together: bool) -> tuple[list[list[int]], list[int]]:
    """Which weights are ranked together, and how many entries are selected in each problem."""
    problems = [list(range(len(weights)))] if together else [[index] for index in range(len(weights))]
    return problems, [math.ceil(sum(weights[index].numel() for index in each) * density) for each in problems]


def select_alone(weights: list[torch.Tensor], density: float, *, together: bool) -> list[torch.Tensor]:
    scores = [SortableScores.of(weight) for weight in weights]
    problems, counts = ranked(weights, density, together=together)
    chosen = (select([scores[index] for index in each], count) for each, count in zip(problems, counts, strict=True))
    return [mask for masks in chosen for mask in masks]


def select_on(size: int, weights: list[torch.Tensor], density: float, *, together: bool):
    group = Group(size)
    parts = [cut(weight, size) for weight in weights]
    problems, counts = ranked(weights, density, together=together)
    results = group.run(
        lambda rank: select_sharded([SortableScores.of(part[rank.rank]) for part in parts], problems, counts, rank)
    )
    masks = [torch.cat([masks[index] for masks, _ in results]) for index in range(len(weights))]
    assert len({tuple(selected) for _, selected in results}) == 1
    return masks, results[0][1], group


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, 1e-45, 1e-38]),  # ties, zeros, subnormals
    st.floats(min_value=0, width=16),
)


@st.composite
def weights(draw):
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    shapes = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 5)), min_size=1, max_size=4))
    return [
        torch.tensor(draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns)), dtype=dtype).view(
            rows, columns
        )
        for rows, columns in shapes
    ]


@settings(max_examples=150, deadline=None)
@given(weights(), st.floats(0.01, 1.0), st.integers(1, 4))
def test_masks_within_weights_are_those_of_one_process(tensors, density, size):
    masks, selected, _ = select_on(size, tensors, density, together=False)
    expected = select_alone(tensors, density, together=False)
    for mask, other, count in zip(masks, expected, selected, strict=True):
        assert torch.equal(mask, other)
        assert count == int(mask.count_nonzero())


@settings(max_examples=150, deadline=None)
@given(weights(), st.floats(0.01, 1.0), st.integers(1, 4))
def test_masks_across_weights_are_those_of_one_process(tensors, density, size):
    masks, selected, _ = select_on(size, tensors, density, together=True)
    expected = select_alone(tensors, density, together=True)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    assert selected == [int(mask.count_nonzero()) for mask in expected]


@pytest.mark.parametrize("together", [False, True])
def test_random_scores_of_many_rows(together):
    torch.manual_seed(0)
    tensors = [torch.rand(301, 40), torch.rand(7, 11), torch.rand(2, 3) + 5]
    masks, _, _ = select_on(3, tensors, 0.3, together=together)
    expected = select_alone(tensors, 0.3, together=together)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))


def test_ties_go_to_the_lower_ranks_first():
    masks, _, _ = select_on(3, [torch.ones(5, 2)], 0.5, together=False)
    assert masks[0].flatten().tolist() == [True] * 5 + [False] * 5


def test_communication_is_a_few_small_tensors_for_all_weights_together():
    torch.manual_seed(0)
    _, _, group = select_on(2, [torch.rand(20, 10) for _ in range(5)], 0.3, together=False)
    # Per 16-bit digit of fp32 two histograms of 256 counts for each weight; no two scores are equal.
    assert [tuple(part.shape) for part in group.sent] == [(5, 256)] * 4
    _, _, group = select_on(2, [torch.ones(20, 10) for _ in range(5)], 0.3, together=False)
    assert [tuple(part.shape) for part in group.sent] == [(5, 256)] * 4 + [(5,)]
    _, _, group = select_on(2, [torch.rand(20, 10) for _ in range(5)], 0.3, together=True)
    assert [tuple(part.shape) for part in group.sent] == [(1, 256)] * 4 + [(5,)]  # how many of each are selected


def test_no_weights_need_no_communication():
    assert select_sharded([], [], [], Rank(Group(1), 0)) == ([], [])
