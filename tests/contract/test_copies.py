"""Copies and pickles of a model, also in the middle of training, go on by themselves."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

from peft_dps import DPSLayer
from peft_dps.tuner.adapter import find_controllers

pytestmark = pytest.mark.device

STEPS = pytest.mark.parametrize("steps", [0, 1, 3, 5], ids=["fresh", "accumulate", "subnetwork", "next cycle"])


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def trained_on(case, model, optimizer, steps=5):
    case.train(model, steps, optimizer)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, str(model.dps_status())


@pytest.mark.supports("Adapters", "copies: `copy.deepcopy`, `pickle`, `torch.save`")
@STEPS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=lambda function: function.__name__)
def test_a_copy_trains_on_as_the_original_would(mlp, duplicate, steps):
    model = mlp.model()
    optimizer = mlp.optimizer(model)
    mlp.train(model, steps, optimizer)
    other = duplicate(model)
    assert str(other.dps_status()) == str(model.dps_status())
    other_optimizer = mlp.optimizer(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    status = str(model.dps_status())
    theirs = trained_on(mlp, other, other_optimizer)
    assert str(model.dps_status()) == status, "training the copy moved the original's clock"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mine = trained_on(mlp, model, optimizer)
    assert mine[1] == theirs[1]
    assert all(torch.equal(tensor, theirs[0][name]) for name, tensor in mine[0].items())


@pytest.mark.supports("Adapters", "copies: `copy.deepcopy`, `pickle`, `torch.save`")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=lambda function: function.__name__)
def test_copies_of_transformers_models(case, duplicate):
    model = case.model()
    case.train(model, steps=3)
    other = duplicate(model)
    assert torch.equal(case.output(other), case.output(model))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        if isinstance(mine, DPSLayer):
            assert mine.dps_controllers["default"] is not theirs.dps_controllers["default"]
    assert str(other.dps_status()) == str(model.dps_status())


def test_a_copy_of_a_merged_model_unmerges_by_itself(mlp):
    model = mlp.model(init_weights=False)
    model.merge_adapter()
    other = copy.deepcopy(model)
    model.unmerge_adapter()
    with other.disable_adapter():
        assert torch.equal(mlp.output(other), mlp.output(mlp.base()))


@pytest.mark.parametrize("end", ["dropped", "unloaded", "merged", "deleted"])
def test_a_model_that_is_gone_leaves_nothing_behind(mlp, end):
    model = mlp.model()
    model.add_adapter("other", mlp.config())
    mlp.train(model, steps=3)
    layers = [module for module in model.modules() if isinstance(module, DPSLayer)]
    subnetwork = weakref.ref(layers[0].dps_controllers["default"])
    layer = weakref.ref(layers.pop(0))
    del layers
    kept = None
    if end == "unloaded":
        kept = model.unload()
    elif end == "merged":
        kept = model.merge_and_unload()
    elif end == "deleted":
        model.set_adapter("other")
        model.delete_adapter("default")
        kept = model
    del model
    gc.collect()
    assert subnetwork() is None
    assert (layer() is None) == (end != "deleted")
    # Optimizers of other models are as if it had never been.
    other = mlp.model()
    mlp.train(other, steps=2)
    assert other.dps_status().steps == 2
    del kept


@pytest.mark.parametrize("end", ["unloaded", "deleted"])
def test_who_still_holds_a_subnetwork_does_not_disturb_other_models(mlp, end):
    model = mlp.model()
    held = find_controllers(model)  # as the Trainer's callback does
    if end == "unloaded":
        model = model.unload()
    else:
        model.delete_adapter("default")
    gc.collect()
    other = mlp.model()
    mlp.train(other, steps=2)
    assert other.dps_status().steps == 2
    assert held["default"].clock.step == 0
