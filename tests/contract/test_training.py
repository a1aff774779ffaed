"""What training changes, and what it leaves alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSLayer, Stage
from peft_dps.tuner.adapter import find_controllers
from tests.device import DEVICE

pytestmark = pytest.mark.device


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


def test_only_the_adapter_and_modules_to_save_change(case, snapshot):
    model = case.model()
    before = snapshot(model)
    case.train(model, steps=6)
    names = changed(before, snapshot(model))
    assert names
    assert all("dps_" in name or ".modules_to_save." in name for name in names), names
    weights = {name for name in before if "dps_weight" in name}
    assert weights <= names
    if case.name != "gpt2":
        assert any(".modules_to_save." in name for name in names)


def test_trainable_parameters_are_the_adapter_and_modules_to_save(case):
    for name, parameter in case.model().named_parameters():
        assert parameter.requires_grad == (".dps_" in name or ".modules_to_save." in name), name


@pytest.mark.supports("Layers", "trains, {variant}", row="case")
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_both_stages_train(case, variant):
    model = case.model(variant=variant)
    optimizer = case.optimizer(model)
    case.train(model, 2, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".dps_weight." in name}
    case.train(model, 2, optimizer)
    status = model.dps_status()
    assert (status.steps, status.stage, status.engaged, status.frozen_moved) == (4, Stage.SUBNETWORK, True, False)
    assert {layer.observed for layer in status.layers.values()} == {2}
    for name, weight in before.items():
        moved = int((model.get_parameter(name) != weight).sum())
        assert 0 < moved <= math.ceil(0.5 * weight.numel()), name


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_scores_in_bf16_are_those_of_fp32_rounded(case, variant):
    """In the first step, where there is nothing to add to; and they choose entries as any scores do."""
    totals = []
    for score_dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = case.model(variant=variant, score_dtype=score_dtype)
        case.train(model, steps=1)
        totals.append([weight.gathered.total for weight in find_controllers(model)["default"].weights])
    for wide, narrow in zip(*totals, strict=True):
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(wide.to(torch.bfloat16), narrow)
    case.train(model, steps=3)
    status = model.dps_status()
    assert (status.engaged, status.frozen_moved) == (True, False)
    for layer in status.layers.values():
        assert layer.selected == math.ceil(0.5 * layer.entries)


def test_a_fresh_adapter_changes_no_output(case):
    torch.testing.assert_close(case.output(case.model()), case.output(case.base()), rtol=1e-6, atol=1e-6)


@pytest.mark.supports("Training", "`train_bias=False`")
def test_train_bias_false_keeps_the_pretrained_bias(case, snapshot):
    model = case.model(train_bias=False)
    before = snapshot(model)
    case.train(model, steps=3)
    assert not any("dps_bias" in name for name in before)
    for layer in dps_layers(model):
        bias = getattr(layer.get_base_layer(), "bias", None)
        assert layer.bias is bias or torch.equal(layer.bias, bias)
    assert changed(before, snapshot(model))


def test_init_weights_false_perturbs_the_copies(case):
    model = case.model(init_weights=False)
    assert not torch.allclose(case.output(model), case.output(case.base()), atol=1e-4)
    for layer in dps_layers(model):
        assert 0.01 < layer.get_delta_weight("default").std() < 0.03


@pytest.mark.supports("Training", "gradient checkpointing, reentrant or not")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_trains_the_same(transformer, use_reentrant, snapshot):
    plain, checkpointed = transformer.model(), transformer.model()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        transformer.train(model, steps=5)
    assert checkpointed.dps_status().steps == 5
    assert checkpointed.dps_status().engaged
    expected, actual = snapshot(plain), snapshot(checkpointed)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.supports("Training", "`torch.compile` of the base or of the PEFT model")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_models_train_and_engage(mlp, when, snapshot):
    expected = mlp.model()
    if when == "before":
        compiled = model = get_peft_model(torch.compile(mlp.base(), backend="eager"), mlp.config())
    else:
        model = mlp.model()
        compiled = torch.compile(model, backend="aot_eager")
    for trained in (expected, compiled):
        mlp.train(trained, steps=4)
    status = model.dps_status()
    assert (status.steps, status.stage, status.engaged) == (4, Stage.SUBNETWORK, True)
    assert not status.frozen_moved
    torch.testing.assert_close(mlp.output(compiled), mlp.output(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_fp32_copies(case, dtype, input_of):
    model = get_peft_model(case.base().to(dtype), case.config()).eval()
    for layer in dps_layers(model):
        assert layer.dps_weight["default"].dtype == torch.float32
        assert layer.weight.dtype == dtype
        assert layer.get_base_layer().weight.dtype == dtype
        x = input_of(layer, dtype)
        assert layer(x).dtype == dtype
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_inactive_adapters_on_half_precision_bases_stay_frozen(case):
    model = get_peft_model(case.base().to(torch.bfloat16), case.config())
    model.add_adapter("other", case.config())
    for layer in dps_layers(model):
        assert layer.dps_weight["other"].dtype == torch.float32
        assert not layer.dps_weight["other"].requires_grad
        assert layer.dps_weight["default"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_autocast_adapter_dtype_keeps_the_dtype_of_the_base(case, dtype):
    model = get_peft_model(case.base().to(dtype), case.config(), autocast_adapter_dtype=False)
    assert {layer.dps_weight["default"].dtype for layer in dps_layers(model)} == {dtype}


def test_half_precision_training_updates_smaller_than_the_base_can_hold(mlp):
    model = get_peft_model(mlp.base().to(torch.bfloat16), mlp.config())
    layer = dps_layers(model)[0]
    before = layer.dps_weight["default"].detach().clone()
    inputs = mlp.inputs.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model(inputs).float().square().sum().backward()
    optimizer.step()
    after = layer.dps_weight["default"].detach()
    assert not torch.equal(before, after)
    assert torch.equal(before.bfloat16(), after.bfloat16())


def test_autocast_computes_in_half_and_trains_in_fp32(case, input_of):
    model = case.model()
    layer = dps_layers(model)[0]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        looks_up = isinstance(layer.get_base_layer(), nn.Embedding)  # which autocast leaves alone
        assert layer(input_of(layer)).dtype == (torch.float32 if looks_up else torch.bfloat16)
        case.train(model, steps=3)
    assert layer.dps_weight["default"].dtype == torch.float32
    assert model.dps_status().engaged
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        half = case.output(model)
    torch.testing.assert_close(half.float(), case.output(model), rtol=0.1, atol=0.05)


@pytest.mark.supports("Training", "adapters trained in turns, or together")
def test_two_adapters_trained_in_turns_keep_their_own_clocks(mlp, snapshot):
    """Each ends as if the other had never been there."""
    together = mlp.model()
    together.add_adapter("other", mlp.config(stage_steps=3))
    optimizers = {}
    for name in ("default", "other"):
        together.set_adapter(name)
        optimizers[name] = mlp.optimizer(together)
    turns = {"default": iter((1, 2, 2)), "other": iter((2, 2, 3))}
    for name in itertools.chain.from_iterable([("default", "other")] * 3):
        together.set_adapter(name)
        mlp.train(together, next(turns[name]), optimizers[name])
    assert (together.dps_status("default").steps, together.dps_status("other").steps) == (5, 7)
    assert together.dps_status("default").cycle == together.dps_status("other").cycle == 2
    trained = snapshot(together)
    for name, stage_steps, steps in (("default", 2, 5), ("other", 3, 7)):
        alone = get_peft_model(mlp.base(), mlp.config(stage_steps=stage_steps), adapter_name=name)
        mlp.train(alone, steps)
        for key, tensor in snapshot(alone).items():
            assert torch.equal(trained[key], tensor), key


def test_inactive_adapters_stay_frozen(case, snapshot):
    model = case.model()
    model.add_adapter("other", case.config(init_weights=False))
    before = snapshot(model)
    case.train(model, steps=3)
    assert not [name for name in changed(before, snapshot(model)) if ".other" in name]
    assert model.dps_status("other").steps == 0


@pytest.mark.supports("Training", "adapters trained in turns, or together")
def test_several_active_adapters_train_together(mlp, snapshot):
    config = mlp.config(modules_to_save=None)
    model = get_peft_model(mlp.base(), config)
    model.add_adapter("other", mlp.config(modules_to_save=None, stage_steps=1))
    model.base_model.set_adapter(["default", "other"])
    before = snapshot(model)
    mlp.train(model, steps=4)
    names = changed(before, snapshot(model))
    assert {name for name in before if "dps_" in name} <= names
    assert not [name for name in names if "dps_" not in name]
    assert model.dps_status("default").stage is Stage.SUBNETWORK
    assert model.dps_status("other").cycle == 2


def test_inputs_of_another_dtype_are_computed_in_theirs(mlp):
    layer = dps_layers(mlp.model())[0]
    x = torch.randn(2, 8, dtype=torch.float64, device=DEVICE)
    expected = nn.functional.linear(x, layer.dps_weight["default"].double(), layer.dps_bias["default"].double())
    assert torch.equal(layer(x), expected)
