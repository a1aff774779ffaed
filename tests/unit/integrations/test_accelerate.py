from __future__ import annotations

import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from peft_dps import register_for_checkpointing
from peft_dps.errors import ConfigError, StateError
from tests.resuming import assert_same
from tests.unit.conftest import controller_of, trainable, weights_of


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps what earlier trainings of the process have set, such as a data loader at its end."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.supports("Training", "Accelerate: as a plain loop, to the bit")
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


def test_adapters_of_one_name_are_refused(make_model):
    accelerator = Accelerator(cpu=True)
    student, teacher = make_model(), make_model()
    register_for_checkpointing(accelerator, student)
    for again in (student, teacher):
        with pytest.raises(ConfigError, match="adapter 'default' is registered with this accelerator already"):
            register_for_checkpointing(accelerator, again)
    register_for_checkpointing(Accelerator(cpu=True), teacher)
    assert len(accelerator._custom_objects) == 1


def test_a_registered_model_is_freed_with_its_accelerator(make_model):
    accelerator, model = Accelerator(cpu=True), make_model()
    register_for_checkpointing(accelerator, model)
    gone = weakref.ref(model)
    del accelerator, model
    gc.collect()
    assert gone() is None


class Loop:
    """A training by Accelerate, two micro-batches a step, dropout on."""

    def __init__(self, model, register=True):
        self.model = model
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.prepared, self.optimizer = self.accelerator.prepare(model, AdamW(trainable(model), lr=1e-2))
        if register:
            register_for_checkpointing(self.accelerator, self.prepared)

    def run(self, batches):
        for x, y in batches:
            with self.accelerator.accumulate(self.prepared):
                loss = nn.functional.cross_entropy(self.prepared(nn.functional.dropout(x, 0.2)), y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def state(self):
        status, tensors = self.model.dps_status(), self.model.dps_state_dict()["tensors"]
        return status, {**tensors, **dict(self.model.state_dict())}


@pytest.mark.supports("Training", "resuming to the bit, Accelerate (`save_state`, `load_state`)")
@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_save_state_and_load_state_resume_bitwise(make_model, batches, tmp_path, variant, steps):
    data = batches(20)
    whole = Loop(make_model(variant=variant, stage_steps=3, total_steps=10))
    whole.run(data[: 2 * steps])
    whole.accelerator.save_state(str(tmp_path))
    whole.run(data[2 * steps :])
    AcceleratorState._reset_state(True)
    resumed = Loop(make_model(variant=variant, stage_steps=3, total_steps=10))
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(data[2 * steps :])
    assert resumed.state()[0] == whole.state()[0]
    assert_same(resumed.state()[1], whole.state()[1])


def test_what_was_not_registered_at_both_ends_is_an_error(make_model, batches, tmp_path):
    registered, forgotten = Loop(make_model()), Loop(make_model(), register=False)
    registered.accelerator.save_state(str(tmp_path / "with"))
    forgotten.accelerator.save_state(str(tmp_path / "without"))
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        forgotten.accelerator.load_state(str(tmp_path / "with"))
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        registered.accelerator.load_state(str(tmp_path / "without"))
    with pytest.raises(ConfigError, match="trains no DPS adapter"):
        register_for_checkpointing(registered.accelerator, nn.Linear(2, 2))


def test_a_state_that_is_missing_from_the_folder_is_an_error(make_model, batches, tmp_path):
    loop = Loop(make_model())
    loop.run(batches(2))
    loop.accelerator.save_state(str(tmp_path))
    (tmp_path / "dps_state.default.safetensors").unlink()
    with pytest.raises(StateError, match="no training state at"):
        loop.accelerator.load_state(str(tmp_path))
    assert controller_of(loop.model).clock.step == 1
