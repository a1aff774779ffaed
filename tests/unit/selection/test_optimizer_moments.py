from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from peft_dps.errors import EngineError
from peft_dps.selection.optimizer_moments import MomentScores, second_moments


def test_adam_with_decoupled_weight_decay_is_taken():
    weight = nn.Parameter(torch.ones(2, 2))
    found = second_moments(AdamW([weight], weight_decay=0.1), {"w": weight})["w"]
    assert found.value is None
    assert (found.decay, found.share) == (0.999, pytest.approx(0.001))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_second_moment_in_16_bits_is_refused(dtype):
    weight = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(EngineError, match=r"AdamW keeps none of 'w' that DPS can read.* on weights in fp32"):
        second_moments(optimizer, {"w": weight})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scores: pickle.loads(pickle.dumps(scores))])  # noqa: S301
def test_copies_hold_what_they_were_made_of(copied):
    before = torch.rand(3, 4)
    scores = MomentScores(before, 0.1)
    scores.count_step(0.9)
    other = copied(scores)
    assert torch.equal(other.before, before)
    assert other.facts == {"share": 0.1, "decay": 0.9, "steps": 1}
    assert copied(MomentScores(None, 0.1)).before is None


@pytest.mark.parametrize("shape", [(0, 4), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_waits_in_the_file_comes_back_bit_for_bit(shape, dtype):
    before = torch.randn(shape).to(dtype)
    assert torch.equal(MomentScores(before, 0.1).before, before)


def test_what_only_decayed_scores_exactly_zero():
    before = torch.rand(1000) * 1e3
    scores, now = MomentScores(before, 0.001), before.clone()
    for _ in range(40):
        now.mul_(0.999)
        scores.count_step(0.999)
    assert not scores.scores(now, torch.empty(1000)).any()
    now[500] *= 1.01
    assert scores.scores(now, torch.empty(1000)).nonzero().item() == 500
