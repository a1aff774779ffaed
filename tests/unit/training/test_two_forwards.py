"""A loss of two forwards and one backward, as R-Drop and R3F have: the network of a step is one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig
from peft_dps.masking.noise import ColumnNoise
from tests.reference import ReferenceDense, ReferenceMix
from tests.unit.conftest import controller_of, trainable

SIZES = (12, 7, 9, 3)
FIELDS = {"density": 0.4, "stage_steps": 3}
STEPS = 9


class Dropping(nn.Module):
    """Linear layers with tanh and dropout between them; `weights` stand in for those of the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(SIZES)).double()

    def forward(self, x: torch.Tensor, weights=None) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = nn.functional.dropout(torch.tanh(x), 0.2, self.training) if index else x
            x = layer(x) if weights is None else nn.functional.linear(x, weights[index])
        return x


def consistency(step: int, first, second, x, y) -> torch.Tensor:
    """R-Drop: cross entropy of both, and how far their distributions are from each other in both directions."""
    torch.manual_seed(step)  # of dropout, which differs between the two forwards
    one, two = first(x), second(x)
    pairs = ((one, two), (two, one))
    apart = [nn.functional.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean") for a, b in pairs]
    return nn.functional.cross_entropy(one, y) + nn.functional.cross_entropy(two, y) + 0.5 * sum(apart)


def data():
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 12, generator=generator).double()
        yield step, x, torch.randint(3, (8,), generator=generator)


def make(**fields):
    targets = [f"layers.{index}" for index in range(3)]
    return get_peft_model(Dropping(), DPSConfig(target_modules=targets, **{**FIELDS, **fields}))


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_copies_follow_the_reference(variant):
    model, plain = make(variant=variant, seed=5), Dropping()
    weights = [layer.weight for layer in plain.layers]
    if variant == "dense":
        reference = ReferenceDense(weights, **FIELDS)
    else:
        noise, cpu = ColumnNoise(FIELDS["density"], 5), torch.device("cpu")
        reference = ReferenceMix(
            weights, draw=lambda step: [b.double() for b in noise.draw(step, SIZES[:-1], cpu)], decay=False, **FIELDS
        )
    ours, theirs = AdamW(trainable(model), lr=1e-2), AdamW(weights, lr=1e-2)
    for step, x, y in data():
        consistency(step, model, model, x, y).backward()
        ours.step()
        ours.zero_grad()
        seen = None if variant == "dense" else reference.effective()

        def net(x, seen=seen):
            return plain(x, seen)

        consistency(step, net, net, x, y).backward()
        reference.before_step()
        theirs.step()
        theirs.zero_grad()
        reference.after_step()
        for tracked, expected in zip(controller_of(model).weights, weights, strict=True):
            torch.testing.assert_close(tracked.weight, expected.detach(), rtol=0, atol=1e-9)
    assert model.dps_status().steps == STEPS


def test_compact_columns_follow_the_reference():
    """Evidence is that of each forward: the sum over both of the squared gradient that it brings."""
    model = make(storage="compact", granularity="column", schedule="once", score_steps=3)
    plain, ours = Dropping(), AdamW(trainable(model), lr=1e-2)
    base = [layer.weight.detach() for layer in plain.layers]
    sums = [torch.zeros(weight.shape[1]).double() for weight in base]
    columns, deltas, theirs = None, [], None
    for step, x, y in data():
        consistency(step, model, model, x, y).backward()
        ours.step()
        ours.zero_grad()
        if step == 4:
            columns = [total.topk(math.ceil(len(total) * FIELDS["density"])).indices.sort().values for total in sums]
            deltas = [torch.zeros(w.shape[0], len(c)).double() for w, c in zip(base, columns, strict=True)]
            deltas = [delta.requires_grad_() for delta in deltas]
            theirs = AdamW(deltas, lr=1e-2)
        whole = base
        if columns is not None:
            whole = [w.index_add(1, c, d) for w, c, d in zip(base, columns, deltas, strict=True)]
        passes = [[w.detach().clone().requires_grad_() for w in whole] for _ in range(2)]
        nets = [lambda x, own=own: plain(x, own) for own in passes]
        consistency(step, *nets, x, y).backward()
        for index, pair in enumerate(zip(*passes, strict=True)):
            if columns is None:
                sums[index] += sum(each.grad.square().sum(0) for each in pair)
            else:
                deltas[index].grad = sum(each.grad[:, columns[index]] for each in pair)
        if theirs is not None:
            theirs.step()
        for tracked, total in zip(controller_of(model).weights, sums, strict=True):
            if columns is None:
                torch.testing.assert_close(tracked.gathered.total, total, rtol=1e-9, atol=0)
        for tracked, chosen, delta in zip(controller_of(model).weights, columns or (), deltas, strict=bool(columns)):
            order = tracked.delta.index.long().argsort()
            assert torch.equal(tracked.delta.index.long()[order], chosen)
            torch.testing.assert_close(tracked.weight[:, order], delta.detach(), rtol=0, atol=1e-9)
    assert model.dps_status().engaged
