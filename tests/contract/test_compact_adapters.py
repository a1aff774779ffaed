"""What PEFT promises of every tuner, kept by compact storage on every kind of layer and of unit."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dps.tuner.layers.layer import DPSLayer
from tests.compact import Tile
from tests.contract.zoo import ZOO, Whole

pytestmark = pytest.mark.device

UNITS = ["column", "row", "entry", Tile.__name__.lower(), "block"]


@pytest.fixture(params=UNITS)
def compact(request, case):
    """Configurations of compact adapters for a case, of which several may be active."""
    options = {
        "modules_to_save": None, "storage": "compact", "granularity": request.param, "schedule": "once",
        "score_steps": 1, "density": 0.4, **({"task_type": None} if case.name == "bert" else {}),
    }  # fmt: skip
    return lambda **more: case.config(**{**options, **more})


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


def test_a_fresh_adapter_changes_no_output(case, compact):
    assert torch.equal(case.output(get_peft_model(case.base(), compact()).eval()), case.output(case.base()))


@pytest.mark.supports("Layers", "compact: trains, disables to the bit", row="case")
def test_it_trains_and_disables_to_the_bit(case, compact):
    expected, model = case.output(case.base()), get_peft_model(case.base(), compact()).eval()
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "dps_" not in name}
    case.train(model, steps=4)
    trained = case.output(model)
    assert not torch.equal(trained, expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    with model.disable_adapter():
        assert torch.equal(case.output(model), expected)
    assert torch.equal(case.output(model), trained)
    status = model.dps_status()
    assert status.engaged
    assert 0 < status.selected <= status.entries


def test_several_active_adapters_are_the_base_plus_their_deltas(case, compact):
    model = get_peft_model(case.base(), compact(init_weights=False)).eval()
    model.add_adapter("other", compact(init_weights=False, train_bias=False))
    model.base_model.set_adapter(["default", "other"])
    for layer in layers_of(model):
        deltas = sum(layer.get_delta_weight(name) for name in ("default", "other"))
        torch.testing.assert_close(layer.weight, layer.get_base_layer().weight + deltas)
    both = case.output(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(case.output(merged), both, rtol=1e-5, atol=1e-5)


def test_beside_a_copy(case, compact):
    model = get_peft_model(case.base(), compact(init_weights=False)).eval()
    model.add_adapter("whole", case.config(modules_to_save=None, task_type=None, init_weights=False))
    outputs = {}
    for names in (["default"], ["whole"], ["default", "whole"]):
        model.base_model.set_adapter(names)
        outputs[len(outputs)] = case.output(model)
    assert all(not torch.allclose(one, other) for one, other in itertools.combinations(outputs.values(), 2))
    merged = model.merge_and_unload()
    torch.testing.assert_close(case.output(merged), outputs[2], rtol=1e-5, atol=1e-5)


def test_switching_deleting_and_adding_anew(case, compact):
    base, model = case.output(case.base()), get_peft_model(case.base(), compact(init_weights=False)).eval()
    first = case.output(model)
    model.add_adapter("other", compact(init_weights=False))
    model.set_adapter("other")
    assert not torch.allclose(case.output(model), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(case.output(model), first)
    model.add_adapter("other", compact())
    model.set_adapter("other")
    assert torch.equal(case.output(model), base)


def test_inactive_adapters_stay_frozen(case, compact):
    model = get_peft_model(case.base(), compact())
    model.add_adapter("other", compact(init_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items() if "other" in name}
    case.train(model, steps=3)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "other" in name)


def test_merging_unmerges_to_the_bit(case, compact):
    model = get_peft_model(case.base(), compact(init_weights=False)).eval()
    before = case.output(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(case.output(model), before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(case.output(model), before)


def test_saving_and_loading(case, compact, tmp_path):
    model = get_peft_model(case.base(), compact())
    case.train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(case.output(loaded), case.output(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.supports("Dtypes", "base, compact", row="dtype")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_units_train_in_fp32_or_more_whatever_the_base(case, compact, dtype):
    dtype = getattr(torch, dtype)
    model = get_peft_model(case.base().to(dtype), compact())
    case_inputs = case.inputs if case.inputs.dtype is torch.int64 else case.inputs.to(dtype)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    model.train()
    for _ in range(3):
        output = model(case_inputs)
        getattr(output, "logits", output).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = [layer.dps_delta["default"].weight for layer in layers_of(model)]
    assert {weight.dtype for weight in trained} == {torch.float64 if dtype is torch.float64 else torch.float32}
    assert any(bool(weight.count_nonzero()) for weight in trained)


def test_the_status_of_layers(case, compact):
    model = get_peft_model(case.base(), compact())
    status = model.get_model_status()
    assert (status.active_adapters, status.requires_grad, status.merged_adapters) == (
        ["default"],
        {"default": True},
        [],
    )


@pytest.mark.supports("Models", "trains, compact {granularity}", row="whole")
@pytest.mark.parametrize("granularity", ["column", "entry"])
@pytest.mark.parametrize("whole", ZOO, ids=str)
def test_whole_models_train(whole: Whole, granularity):
    fields = {"storage": "compact", "granularity": granularity, "schedule": "once", "score_steps": 1, "density": 0.5}
    model = whole.model(**fields)
    losses = whole.train(model, 4, whole.optimizer(model))
    status = model.dps_status()
    assert (status.steps, status.engaged) == (4, True)
    assert losses[-1] < losses[1]


def test_what_is_read_is_trained(case):
    """Attention of torch reads the weight of its output projection, and never calls the layer."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    for granularity in UNITS:
        model = get_peft_model(
            nn.Sequential(attention),
            case.config(
                target_modules=["0.out_proj"], modules_to_save=None, task_type=None, storage="compact",
                granularity=granularity, schedule="once", score_steps=1, density=0.5,
            ),
        )  # fmt: skip
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
        x = torch.randn(2, 3, 8)
        for _ in range(3):
            optimizer.zero_grad()
            model.base_model.model[0](x, x, x)[0].square().mean().backward()
            optimizer.step()
        (layer,) = layers_of(model)
        assert bool(layer.get_delta_weight("default").count_nonzero()), granularity
        model.unload()
