"""What is an alarm and what is none: weights that change between optimizer steps, work that is captured in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from peft_dps.errors import EngineError
from peft_dps.training import guards
from tests.unit.conftest import train, trainable


def perturb_and_restore(model, batch, *, through_data):
    """As adversarial weight perturbation and sharpness-aware minimization do for each micro-batch."""
    x, y = batch
    nn.functional.cross_entropy(model(x), y).backward()
    kept = [parameter.detach().clone() for parameter in trainable(model)]
    with torch.no_grad():
        for parameter in trainable(model):
            target = parameter.data if through_data else parameter
            target.add_(0.05 * parameter.grad / parameter.grad.norm())
    nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for parameter, before in zip(trainable(model), kept, strict=True):
            (parameter.data if through_data else parameter).copy_(before)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_perturbed_forwards_are_no_alarm(make_model, batches, micro_batches, through_data):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    for _ in range(3):
        for batch in batches(micro_batches):
            perturb_and_restore(model, batch, through_data=through_data)
        optimizer.step()
        optimizer.zero_grad()
    assert model.dps_status().steps == 3


def test_averaged_weights_that_are_swapped_in_for_a_look_are_no_alarm(make_model, batches):
    model = make_model()
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    own, averaged = ({name: factor * each for name, each in model.state_dict().items()} for factor in (1.0, 0.9))
    for x, _ in batches(6):
        for state in (averaged, own):
            model.load_state_dict(state)
            model(x)
    assert model.dps_status().steps == 1


@pytest.fixture
def captured(monkeypatch):
    """Lets work seem to be captured in a CUDA graph from now on; `tests.contract.test_accelerators` captures some."""
    return lambda: monkeypatch.setattr(guards, "_is_captured", lambda: True)


NO_PYTHON = "a replay runs no Python, so that nothing would be counted, scored or selected"


@pytest.mark.refuses("Devices", "an optimizer step in a CUDA graph", NO_PYTHON)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_captured_step_is_refused_and_not_counted(make_model, batches, captured, steps):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(steps))
    captured()
    with pytest.raises(EngineError, match=r"SGD is being captured in a CUDA graph.*outside of the graph"):
        train(model, optimizer, batches(1))
    assert model.dps_status().steps == steps


@pytest.mark.refuses("Devices", "a forward with noise, or that scores or selects units, in a CUDA graph", NO_PYTHON)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_captured_forward_is_refused_for_mix_alone(make_model, batches, captured, steps):
    models = [make_model(variant=variant) for variant in ("dense", "mix")]
    ((x, _),) = batches(1)
    for model in models:
        train(model, SGD(trainable(model), lr=0.1), batches(steps))
    captured()
    models[0](x).sum().backward()
    with pytest.raises(EngineError, match=r"'default' is being captured in a CUDA graph.*`variant='dense'`"):
        models[1](x)
    models[1].eval()(x)


def test_a_captured_forward_is_refused_where_one_may_begin_a_phase(make_model, batches, captured):
    model = make_model(schedule="two-phase", score="movement")
    captured()
    with pytest.raises(EngineError, match=r"'default' is being captured in a CUDA graph"):
        model(batches(1)[0][0])


def test_a_captured_forward_is_refused_in_compact_storage_until_units_are_selected(make_model, batches, captured):
    fields = {"storage": "compact", "granularity": "column", "schedule": "once", "score_steps": 2}
    models = [make_model(**fields) for _ in range(2)]
    train(models[1], SGD(trainable(models[1]), lr=0.1), batches(3))
    captured()
    ((x, _),) = batches(1)
    with pytest.raises(EngineError, match=r"captured in a CUDA graph.*`schedule='once'`"):
        models[0](x)
    models[1](x).sum().backward()
