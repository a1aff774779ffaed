from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from tests.unit.conftest import trainable, weights_of


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps what earlier trainings of the process have set, such as a data loader at its end."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_an_accelerate_loop_equals_a_plain_one(make_model, batches):
    plain, model = make_model(), make_model()
    data = batches(12)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = AdamW(trainable(model), lr=1e-2)
    loader = DataLoader([(x, y) for x, y in data], batch_size=None)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    reference = AdamW(trainable(plain), lr=1e-2)
    for (x, y), (x2, y2) in zip(data[::2], data[1::2], strict=True):
        reference.zero_grad()
        (nn.functional.cross_entropy(plain(x), y) / 2).backward()
        (nn.functional.cross_entropy(plain(x2), y2) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    assert model.dps_status() == plain.dps_status()
    assert model.dps_status().steps == 6
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(plain), strict=True))


def test_steps_inside_no_sync_are_not_counted(make_model, batches):
    model = make_model()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer = accelerator.prepare(model, AdamW(trainable(model)))
    for x, y in batches(3):
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert model.dps_status().steps == 0
