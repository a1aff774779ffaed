"""Small files: what `export_adapter` writes is loaded by PEFT like any adapter, and comes back to the bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from peft_dps import DPSConfig, DPSLayer, export_adapter
from peft_dps.errors import AdapterFileError, ConfigError
from tests.contract.test_parameters import CASES as EXPERTS
from tests.device import DEVICE

pytestmark = pytest.mark.device


def adapter_state(model, adapter="default"):
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def stored(path):
    return load_file(path / "adapter_model.safetensors")


def flip_bits(model):
    """Give the adapter's weights every kind of value, NaN and infinity too."""
    for module in model.modules():
        if isinstance(module, DPSLayer):
            weight = module.dps_weight["default"].data
            bits = torch.randint(-(2**31), 2**31 - 1, weight.shape, dtype=torch.int32, device=weight.device)
            weight.copy_(bits.view(torch.float32).to(weight.dtype))
            weight.view(-1)[:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45], device=weight.device)


@pytest.mark.supports("Saving and loading", "exact small files")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_exact_files_load_like_any_other(case, tmp_path, is_trainable, low_cpu_mem_usage, snapshot):
    model = case.model(variant="mix", participation_decay=False)
    case.train(model, steps=3)
    before = snapshot(model)
    report = export_adapter(model, tmp_path)
    assert_same_bits(snapshot(model), before)
    loaded = PeftModel.from_pretrained(
        case.base(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert_same_bits(adapter_state(loaded), adapter_state(model))
    assert torch.equal(case.output(loaded), case.output(model))
    assert report.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    own = [name for name in stored(tmp_path) if ".dps_" in name]
    assert {stored(tmp_path)[name].dtype for name in own} == {torch.uint8}
    if is_trainable:
        case.train(loaded, steps=4)
        assert loaded.dps_status().engaged


@pytest.mark.supports("Saving and loading", "exact small files")
def test_an_exact_file_is_smaller(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(256, 256))
    model = get_peft_model(base, DPSConfig(target_modules=["0"], stage_steps=2))
    layer = next(module for module in model.modules() if isinstance(module, DPSLayer))
    layer.dps_weight["default"].data += 1e-4 * torch.randn(256, 256)
    exact = export_adapter(model, tmp_path / "exact")
    model.save_pretrained(tmp_path / "plain")
    plain = (tmp_path / "plain" / "adapter_model.safetensors").stat().st_size
    assert exact.file_bytes < 0.62 * plain
    assert abs(exact.whole_bytes - plain) < 1000
    assert exact.ratio == exact.file_bytes / exact.whole_bytes
    assert "without loss" in str(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_base_dtypes(mlp, tmp_path, dtype, autocast):
    model = get_peft_model(mlp.base().to(dtype), mlp.config(init_weights=False), autocast_adapter_dtype=autocast)
    flip_bits(model)
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    assert_same_bits(adapter_state(loaded), adapter_state(model))


def test_a_base_of_the_same_values_in_another_dtype_will_do(mlp, tmp_path):
    base = mlp.base().to(torch.bfloat16)
    model = get_peft_model(base, mlp.config(init_weights=False, modules_to_save=None))
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base().to(torch.bfloat16).float(), tmp_path)
    assert_same_bits(adapter_state(loaded), adapter_state(model))


@pytest.mark.supports("Saving and loading", "exact small files")
def test_several_adapters(case, tmp_path):
    model = case.model(init_weights=False)
    model.add_adapter("other", case.config(init_weights=False))
    with pytest.raises(ConfigError, match="must name a DPS adapter of the model, got 'nobody'"):
        export_adapter(model, tmp_path, adapter_name="nobody")
    export_adapter(model, tmp_path, adapter_name="other")
    assert not (tmp_path / "adapter_model.safetensors").exists()
    target = case.model()
    first = adapter_state(target)
    target.load_adapter(tmp_path / "other", "b")
    assert_same_bits(adapter_state(target, "b"), adapter_state(model, "other"))
    assert_same_bits(adapter_state(target), first)
    assert target.active_adapters == ["default"]


@pytest.mark.parametrize("merged", [False, True])
def test_the_bases_embeddings_are_no_part_of_the_file(untied_gpt2, tmp_path, merged):
    model = untied_gpt2.model(target_modules=["lm_head", "c_attn"])
    untied_gpt2.train(model, steps=2)
    expected = untied_gpt2.output(model)
    if merged:
        model.merge_adapter()
    report = export_adapter(model, tmp_path)
    assert not [name for name in stored(tmp_path) if "base_layer" in name]
    own = [layer.dps_weight["default"] for layer in model.modules() if isinstance(layer, DPSLayer)]
    biases = [layer.dps_bias["default"] for layer in model.modules() if isinstance(layer, DPSLayer) and layer.dps_bias]
    assert report.whole_bytes == 4 * sum(each.numel() for each in [*own, *biases])
    loaded = PeftModel.from_pretrained(untied_gpt2.base(), tmp_path).eval()
    torch.testing.assert_close(untied_gpt2.output(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(untied_gpt2.output(loaded), untied_gpt2.output(untied_gpt2.base()))


def test_a_merged_model_is_exported_against_its_pretrained_weights(case, tmp_path):
    model = case.model()
    case.train(model, steps=2)
    model.merge_adapter()
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert_same_bits(adapter_state(loaded), adapter_state(model))


def test_an_adapter_is_loaded_while_it_is_merged(mlp, tmp_path):
    source = mlp.model(init_weights=False)
    export_adapter(source, tmp_path)
    model = mlp.model(init_weights=False)
    model.merge_adapter()
    model.load_adapter(tmp_path, "default")
    assert_same_bits(adapter_state(model), adapter_state(source))


@pytest.mark.parametrize("train_bias", [False, True])
def test_the_rest_of_the_model(transformer, tmp_path, train_bias):
    model = transformer.model(train_remaining=True, train_bias=train_bias)
    transformer.train(model, steps=3)
    plain = export_adapter(model, tmp_path / "plain")
    name = {"bert": "word_embeddings", "gpt2": "wte"}[transformer.name]
    packed = export_adapter(model, tmp_path / "packed", saved_modules=[name])
    assert packed.file_bytes != plain.file_bytes
    whole = {key: tensor.dtype for key, tensor in stored(tmp_path / "plain").items() if ".dps_" not in key}
    assert set(whole.values()) == {torch.float32}
    dtypes = {key: tensor.dtype for key, tensor in stored(tmp_path / "packed").items() if f"{name}." in key}
    assert set(dtypes.values()) == {torch.uint8}
    for path in ("plain", "packed"):
        loaded = PeftModel.from_pretrained(transformer.base(), tmp_path / path).eval()
        assert_same_bits(adapter_state(loaded), adapter_state(model))
        assert torch.equal(transformer.output(loaded), transformer.output(model))


def test_layers_that_are_new_in_each_model_can_be_stored_whole(mlp, tmp_path):
    model = mlp.model(modules_to_save=None, target_modules=["fc", "head"], init_weights=False)
    export_adapter(model, tmp_path, whole=["head"])
    base = mlp.base()
    base.head.reset_parameters()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_same_bits(adapter_state(loaded), adapter_state(model))


def test_state_dicts_and_injected_adapters(mlp, tmp_path):
    model = mlp.model(init_weights=False, modules_to_save=None)
    export_adapter(model, tmp_path)
    state = stored(tmp_path)
    other = mlp.model(modules_to_save=None)
    assert not set_peft_model_state_dict(other, state).unexpected_keys
    assert_same_bits(adapter_state(other), adapter_state(model))
    for prefix in ("base_model.model.", ""):
        bare = inject_adapter_in_model(mlp.config(modules_to_save=None), mlp.base())
        named = {prefix + key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
        set_peft_model_state_dict(bare, named)
        assert torch.equal(mlp.output(bare.eval()), mlp.output(model))


FRESH = """
import sys
import torch
import peft_dps
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(torch.arange(2, 14).view(2, 6)).logits.detach(), sys.argv[2])
"""


def test_auto_classes_and_a_fresh_process(gpt2, tmp_path):
    gpt2.base().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(gpt2.base()).from_pretrained(tmp_path / "base"), gpt2.config()).eval()
    gpt2.train(model, steps=3)
    export_adapter(model, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(gpt2.output(loaded), gpt2.output(model))
    command = [sys.executable, "-c", FRESH, str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=300)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt", map_location=DEVICE), gpt2.output(model), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": ["nobody"]}, "`whole` names 'nobody'"),
        ({"saved_modules": ["fc"]}, "`saved_modules` names 'fc'.*head"),
        ({"whole": "head"}, r"`whole` must be a list of names, got 'head'. Use `\['head'\]`"),
    ],
)
def test_what_cannot_be_exported(mlp, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_adapter(mlp.model(), tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", [None, "", 3, b"folder"])
def test_a_path_that_names_no_folder(mlp, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=re.escape(f"`path` must name the folder to write, as a str or Path, got {path!r}")
    ):
        export_adapter(mlp.model(), path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_none_of_ours(mlp, tmp_path):
    with pytest.raises(ConfigError, match="must be a PeftModel, got MLP"):
        export_adapter(mlp.base(), tmp_path)


@pytest.mark.parametrize("expert", EXPERTS, ids=lambda case: case.name)
def test_single_parameters_as_targets(expert, tmp_path):
    model = expert.model(init_weights=False)
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(expert.base(), tmp_path)
    assert_same_bits(adapter_state(loaded), adapter_state(model))
    state = stored(tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8}
    del state[min(state)]
    save_file(state, tmp_path / "adapter_model.safetensors")
    base = expert.base()
    before, output = [type(module) for module in base.modules()], expert.output(base)
    with pytest.raises(AdapterFileError, match="lacks 1 tensors"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [type(module) for module in base.modules()] == before
    assert torch.equal(expert.output(base), output)


def test_an_offloaded_base_is_the_same_base(case, tmp_path):
    model = case.model(init_weights=False, offload_base=True)
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert_same_bits(adapter_state(loaded), adapter_state(model))


def test_the_difference_of_a_compact_adapter_is_said_to_be_no_smaller(mlp, tmp_path, caplog):
    fields = {"storage": "compact", "granularity": "column", "schedule": "once", "score_steps": 1, "task_type": None}
    model = mlp.model(**fields, modules_to_save=None)
    mlp.train(model, steps=3)
    report = export_adapter(model, tmp_path)
    (record,) = caplog.records
    assert "makes no smaller file than `save_pretrained`. `form='lora'`" in record.getMessage()
    assert report.ratio >= 1
    assert_same_bits(adapter_state(PeftModel.from_pretrained(mlp.base(), tmp_path)), adapter_state(model))
