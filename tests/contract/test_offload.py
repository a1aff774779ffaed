"""`offload_base`: the pretrained weights lie in a file, and nothing else is different."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, get_peft_model
from torch import nn

from peft_dps import DPSConfig, DPSLayer, export_adapter
from peft_dps.errors import ConfigError
from tests.contract.conftest import input_of

pytestmark = pytest.mark.device


def layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


def is_mapped(tensor):
    """Whether one of our files stands behind a tensor, says the system."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return "peft_dps-" in line
    return False


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


@pytest.fixture
def pair(case):
    """Two models that differ in nothing but where the pretrained weights are."""

    def make(**options):
        models = []
        for offload_base in (False, True):
            torch.manual_seed(0)
            models.append(case.model(offload_base=offload_base, **options))
        return models

    return make


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_training_is_the_same_to_the_bit(case, pair, variant):
    models = pair(variant=variant)
    assert all(is_mapped(layer.get_base_layer().weight) for layer in layers(models[1]))
    assert not any(is_mapped(layer.get_base_layer().weight) for layer in layers(models[0]))
    for model in models:
        case.train(model, steps=5)
    assert same(*map(bits, models))
    assert all(is_mapped(layer.get_base_layer().weight) for layer in layers(models[1]))
    outputs = []
    for model in models:
        with model.disable_adapter():
            outputs.append(case.output(model))
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], case.output(case.base()))


def test_merging_combining_and_switching_are_the_same(case, pair):
    outputs = []
    for model in pair(init_weights=False):
        torch.manual_seed(1)
        model.add_adapter("other", case.config(init_weights=False, modules_to_save=None, task_type=None))
        results = [case.output(model)]
        model.set_adapter("other")
        results.append(case.output(model))
        for layer in layers(model):
            layer.set_adapter(["default", "other"])
        results += [case.output(model), *(layer.get_delta_weight("default") for layer in layers(model))]
        model.merge_adapter(["default", "other"])
        results.append(case.output(model))
        model.unmerge_adapter()
        results += bits(model).values()
        outputs.append(results)
    assert len(outputs[0]) == len(outputs[1])
    assert all(torch.equal(one.cpu(), two.cpu()) for one, two in zip(*outputs, strict=True))


@pytest.mark.parametrize("merge", [False, True])
def test_unloading_brings_the_weights_back(case, pair, merge):
    plain, offloaded = (model.merge_and_unload() if merge else model.unload() for model in pair(init_weights=False))
    assert same(bits(plain), bits(offloaded))
    assert not any(is_mapped(parameter) for parameter in offloaded.parameters())


def test_save_and_load(case, pair, tmp_path):
    plain, offloaded = pair(init_weights=False)
    offloaded.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(case.output(loaded), case.output(plain))
    # Where it was trained decides nothing about the disk of whoever loads it to use it.
    assert not any(is_mapped(layer.get_base_layer().weight) for layer in layers(loaded))
    base = get_base_model_state_dict(offloaded)
    expected = case.base().state_dict()
    assert base.keys() == expected.keys()
    assert same(base, expected)
    offloaded.load_state_dict(plain.state_dict())
    assert same(bits(plain), bits(offloaded))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("field", ["offload_base", "lean"])
@pytest.mark.parametrize("save", [lambda model, path: model.save_pretrained(path), export_adapter], ids=["", "export"])
def test_training_goes_on_with_weights_in_a_file(case, tmp_path, save, field, low_cpu_mem_usage):
    save(case.model(init_weights=False, **{field: True}), tmp_path)
    bases = [case.base(), case.base()]
    options = [{"low_cpu_mem_usage": low_cpu_mem_usage}, {}]
    loaded, plain = (
        PeftModel.from_pretrained(base, tmp_path, is_trainable=True, **each)
        for base, each in zip(bases, options, strict=True)
    )
    assert all(is_mapped(layer.get_base_layer().weight) for layer in layers(loaded))
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for model in (loaded, plain):
        case.train(model, steps=3)
    assert same(*map(bits, (loaded, plain)))
    with loaded.disable_adapter():
        assert torch.equal(case.output(loaded), case.output(case.base()))


def test_copies_compute_the_same(case, pair):
    offloaded = pair(init_weights=False)[1]
    buffer = io.BytesIO()
    torch.save(offloaded, buffer)
    buffer.seek(0)
    for duplicate in (copy.deepcopy(offloaded), torch.load(buffer, weights_only=False)):
        assert same(bits(duplicate), bits(offloaded))
        case.train(duplicate, steps=3)
        with duplicate.disable_adapter():
            assert torch.equal(case.output(duplicate), case.output(case.base()))


@pytest.mark.parametrize("merged", [False, True])
def test_casting_keeps_them_in_a_file(case, pair, merged):
    plain, offloaded = pair(init_weights=False)
    for model in (plain, offloaded):
        if merged:
            model.merge_adapter()
        model.double()
        if merged:
            model.unmerge_adapter()
    assert same(bits(plain), bits(offloaded))
    assert all(is_mapped(layer.get_base_layer().weight) for layer in layers(offloaded))
    assert {layer.get_base_layer().weight.dtype for layer in layers(offloaded)} == {torch.float64}


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_moves_leaves_them_on_the_host(case, merged):
    """The meta device stands in for an accelerator: it computes no values, but insists on its own tensors."""
    model = case.model(offload_base=True)
    expected = [layer.pretrained_parameter.detach().clone() for layer in layers(model)]
    if merged:
        model.merge_adapter()
    model.to("meta")
    for layer, weight in zip(layers(model), expected, strict=True):
        x = input_of(layer).to("meta")
        if merged:
            assert layer(x).device.type == "meta"
            layer.unmerge()
        assert layer.pretrained_parameter.device.type == "cpu"
        assert is_mapped(layer.pretrained_parameter)
        assert torch.equal(layer.pretrained_parameter, weight)
        layer.enable_adapters(False)
        assert layer(x).device.type == "meta"
        assert layer.weight.device.type == "meta"
        layer.enable_adapters(True)
        assert layer.get_delta_weight("default").device.type == "meta"
        layer.merge()
        assert layer.get_base_layer().weight.device.type == "meta"
        assert layer(x).device.type == "meta"
        layer.unmerge()
        assert torch.equal(layer.pretrained_parameter, weight)
        layer.update_layer("other", case.config(), layer.dps_controllers["default"])
        assert layer.dps_weight["other"].device.type == "meta"


@pytest.mark.parametrize("together", [False, True])
def test_half_precision_after_moving(together):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), DPSConfig(target_modules=["0"], offload_base=True))
    expected = layers(model)[0].pretrained_parameter.detach().bfloat16()
    model = model.to("meta", torch.bfloat16) if together else model.to("meta").bfloat16()
    (layer,) = layers(model)
    assert torch.equal(layer.pretrained_parameter, expected)
    assert is_mapped(layer.pretrained_parameter)
    assert layer.get_delta_weight("default").device.type == "meta"


def test_they_go_where_an_engine_has_moved_the_copies():
    """As FSDP2 does, one parameter at a time."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4, bias=False)), DPSConfig(target_modules=["0"], offload_base=True)
    )
    (layer,) = layers(model)
    layer.dps_weight["default"] = nn.Parameter(layer.dps_weight["default"].data.to("meta"))
    assert layer.get_delta_weight("default").device.type == "meta"
    layer.enable_adapters(False)
    assert layer.weight.device.type == "meta"
    assert layer(torch.ones(1, 4, device="meta")).device.type == "meta"
    assert is_mapped(layer.pretrained_parameter)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_shared_weights_stay(gpt2, caplog):
    model = gpt2.model(target_modules=["lm_head", "c_fc"], offload_base=True)
    assert "`offload_base` leaves the weight of 'lm_head' in memory" in caplog.text
    inner = model.base_model.model
    assert not is_mapped(inner.transformer.wte.weight)
    assert is_mapped(inner.transformer.h[0].mlp.c_fc.base_layer.weight)


@pytest.mark.parametrize("value", ["disk", 1, None])
def test_bad_values(value):
    with pytest.raises(ConfigError, match="`offload_base` must be True or False"):
        DPSConfig(offload_base=value)
