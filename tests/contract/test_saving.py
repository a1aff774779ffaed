"""Saving and loading: what is in the file, and what comes back, also in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from peft_dps import DPSConfig, DPSLayer, Stage
from tests.device import DEVICE

pytestmark = pytest.mark.device


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


@pytest.mark.parametrize("steps", [0, 1, 3, 5], ids=["fresh", "accumulate", "subnetwork", "next cycle"])
def test_the_saved_file_holds_weights_and_no_training_state(case, steps, tmp_path):
    model = case.model()
    case.train(model, steps)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    saved = load_file(tmp_path / "adapter_model.safetensors")
    head = {"bert": "classifier.", "gpt2": "no head"}.get(case.name, ".head.")
    expected = {name.replace(".default", "") for name in model.state_dict() if ".dps_" in name}
    assert {key for key in saved if head not in key} == expected
    kinds = {"dps_weight"} if case.name == "text" else {"dps_weight", "dps_bias"}
    assert {key.rpartition(".")[2] for key in saved if head not in key} == kinds
    assert sum(tensor.numel() for tensor in saved.values()) == model.get_nb_trainable_parameters()[0]


def test_a_model_within_a_model_is_saved_though_their_adapters_have_one_name(tmp_path):
    def nested():
        torch.manual_seed(0)
        base = torch.nn.ModuleDict({"vision": torch.nn.Linear(4, 4), "text": torch.nn.Linear(4, 4)})
        base["vision"] = get_peft_model(torch.nn.Sequential(base["vision"]), DPSConfig(target_modules=["0"]))
        return base

    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        model = get_peft_model(nested(), DPSConfig(target_modules=["text"], init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nested(), tmp_path)
    assert torch.equal(loaded.base_model.model["text"].dps_weight["default"],
                       model.base_model.model["text"].dps_weight["default"])  # fmt: skip


def test_the_saved_config_comes_back(case, tmp_path):
    model = case.model(density=0.25, frozen="gradient", scope="model", seed=3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DPS"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DPSConfig)
    for name in ("density", "frozen", "scope", "seed", "stage_steps", "variant", "score", "train_bias"):
        assert getattr(loaded, name) == getattr(model.peft_config["default"], name)


@pytest.mark.supports("Layers", "saves and loads", row="case")
@pytest.mark.supports("Saving and loading", "`low_cpu_mem_usage=True`")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_save_and_load(case, tmp_path, is_trainable, low_cpu_mem_usage):
    model = case.model()
    case.train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        case.base(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(case.output(loaded.eval()), case.output(model))
    for layer in dps_layers(loaded):
        assert layer.dps_weight["default"].device == DEVICE
        assert layer.dps_weight["default"].requires_grad == is_trainable
    assert loaded.dps_status().steps == 0
    if is_trainable:
        case.train(loaded, steps=4)
        assert loaded.dps_status().engaged


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_fp32_copies_on_half_precision_bases_survive(mlp, tmp_path, low_cpu_mem_usage):
    model = get_peft_model(mlp.base().to(torch.bfloat16), mlp.config())
    for layer in dps_layers(model):
        layer.dps_weight["default"].data += 1e-5  # more digits than the base's dtype has
    model.save_pretrained(tmp_path)
    base = mlp.base().to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for mine, theirs in zip(dps_layers(loaded), dps_layers(model), strict=True):
        assert mine.dps_weight["default"].dtype == torch.float32
        assert torch.equal(mine.dps_weight["default"], theirs.dps_weight["default"])


@pytest.mark.supports("Saving and loading", "`load_adapter` beside another adapter")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_beside_another(case, tmp_path, low_cpu_mem_usage, snapshot):
    source = case.model(init_weights=False)
    source.save_pretrained(tmp_path)
    model = case.model()
    before = snapshot(model)
    model.load_adapter(tmp_path, adapter_name="loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    assert model.active_adapters == ["default"]
    for name, tensor in snapshot(model).items():
        if ".loaded" not in name:
            assert torch.equal(tensor, before[name])
    assert [p.requires_grad for n, p in model.named_parameters() if ".dps_" in n and ".loaded" in n].count(True) == 0
    model.set_adapter("loaded")
    assert torch.equal(case.output(model), case.output(source))


@pytest.mark.supports("Saving and loading", "`selected_adapters`")
def test_selected_adapters_are_saved(case, tmp_path):
    model = case.model(init_weights=False)
    model.add_adapter("one", case.config(init_weights=False))
    model.add_adapter("two", case.config(init_weights=False))
    model.save_pretrained(tmp_path, selected_adapters=["default", "two"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"two"}
    model.set_adapter("two")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "two").eval()
    assert torch.equal(case.output(loaded), case.output(model))
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "two" in key or "one" in key]


@pytest.mark.supports("Saving and loading", "`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def test_state_dict_round_trip(case):
    source, model = case.model(init_weights=False), case.model()
    state_dict = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(source).items()}
    result = set_peft_model_state_dict(model, state_dict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "dps_" in key]
    assert torch.equal(case.output(model), case.output(source))


@pytest.mark.supports("Saving and loading", "`inject_adapter_in_model`, with a state dict too")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_inject_adapter_in_model(case, low_cpu_mem_usage):
    options = {"modules_to_save": None, "task_type": None}
    source = get_peft_model(case.base(), case.config(**options, init_weights=False)).eval()
    state_dict = get_peft_model_state_dict(source)
    model = inject_adapter_in_model(case.config(**options), case.base(), low_cpu_mem_usage=low_cpu_mem_usage)
    device = "meta" if low_cpu_mem_usage else DEVICE.type
    assert {layer.dps_weight["default"].device.type for layer in dps_layers(model)} == {device}
    assert type(model) is type(case.base())
    result = set_peft_model_state_dict(
        model, {k.removeprefix("base_model.model."): v for k, v in state_dict.items()},
        low_cpu_mem_usage=low_cpu_mem_usage,
    )  # fmt: skip
    assert not result.unexpected_keys
    assert torch.equal(case.output(model.eval()), case.output(source))
    case.train(model, steps=3)
    layer = dps_layers(model)[0]
    assert layer.dps_controllers["default"].stage is Stage.SUBNETWORK


@pytest.mark.supports("Saving and loading", "`inject_adapter_in_model`, with a state dict too")
def test_inject_adapter_by_state_dict(mlp):
    source = get_peft_model(mlp.base(), mlp.config(modules_to_save=None, target_modules=["layers.0.fc"]))
    state_dict = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
    config = mlp.config(modules_to_save=None, target_modules=["layers.0.fc"])
    model = inject_adapter_in_model(config, mlp.base(), state_dict=state_dict)
    names = [name for name, module in model.named_modules() if isinstance(module, DPSLayer)]
    assert names == ["body.layers.0.fc"]


@pytest.mark.supports("Saving and loading", "`get_base_model_state_dict`")
def test_the_state_dict_of_the_base_model(case):
    model = case.model()
    case.train(model, steps=3)
    state_dict, expected = get_base_model_state_dict(model), case.base().state_dict()
    assert set(state_dict) == set(expected)
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


@pytest.fixture
def on_disk(tmp_path):
    def save(case):
        case.base().save_pretrained(tmp_path / "base")
        return type(case.base()).from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter"

    return save


@pytest.mark.supports("Saving and loading", "`AutoPeftModelFor...`")
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_auto_classes(kind, request, on_disk):
    case = request.getfixturevalue(kind)
    auto = {"bert": AutoPeftModelForSequenceClassification, "gpt2": AutoPeftModelForCausalLM}[kind]
    base, path = on_disk(case)
    model = get_peft_model(base, case.config()).eval()
    case.train(model, steps=3)
    model.save_pretrained(path)
    for is_trainable in (False, True):
        loaded = auto.from_pretrained(path, is_trainable=is_trainable).eval()
        assert torch.equal(case.output(loaded), case.output(model))
        assert dps_layers(loaded)[0].dps_weight["default"].requires_grad == is_trainable


FRESH = """
import sys
import torch
import peft_dps
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(torch.arange(2, 14).view(2, 6)).logits.detach(), sys.argv[2])
"""


def test_a_fresh_process_computes_the_same(gpt2, on_disk, tmp_path):
    base, path = on_disk(gpt2)
    model = get_peft_model(base, gpt2.config()).eval()
    gpt2.train(model, steps=3)
    model.save_pretrained(path)
    command = [sys.executable, "-c", FRESH, str(path), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=300)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt", map_location=DEVICE), gpt2.output(model), rtol=1e-5, atol=1e-6
    )


@pytest.mark.supports("Saving and loading", "`safe_serialization=False`")
def test_pickled_files_instead_of_safetensors(mlp, tmp_path):
    model = mlp.model(init_weights=False)
    model.save_pretrained(tmp_path, safe_serialization=False)
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    assert torch.equal(mlp.output(loaded), mlp.output(model))
