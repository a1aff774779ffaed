"""Files and state dicts that do not fit: a clear error, and a model that is what it was."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_dps import DPSConfig, DPSLayer, export_adapter
from peft_dps.errors import AdapterFileError, ConfigError

FILE = "adapter_model.safetensors"
WEIGHT = "base_model.model.body.layers.1.proj.dps_weight"
BIAS = "base_model.model.body.layers.1.fc.dps_bias"


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_tensor(name, make):
    return lambda state: {**state, name: make(state.get(name))}


PLAIN = {
    "missing weight": (without(WEIGHT), "lacks 1 tensors: .*proj.dps_weight"),
    "missing bias": (without(BIAS), "lacks 1 tensors: .*fc.dps_bias"),
    "nothing": (lambda state: {k: v for k, v in state.items() if "dps_" not in k}, "lacks 6 tensors: .*, ..."),
    "extra layer": (
        with_tensor(WEIGHT.replace("1", "7"), lambda _: torch.zeros(8, 8)), "without a place .*layers.7.proj",
    ),
    "transposed": (with_tensor(WEIGHT, lambda _: torch.zeros(8, 7)), r"proj.* has the shape \[8, 7\], the model's is"),
    "flat": (with_tensor(WEIGHT, lambda old: old.flatten()), r"has the shape \[64\]"),
    "integers": (with_tensor(WEIGHT, lambda old: old.long()), "is no weight: its dtype is torch.int64"),
    "head of another size": (
        with_tensor("base_model.model.head.weight", lambda _: torch.zeros(5, 8)),
        r"size mismatch for .*head.*\[5, 8\]",
    ),
}  # fmt: skip


def cut(tensor):
    return tensor[:-5].clone()


def flipped(tensor):
    tensor = tensor.clone()
    tensor[-40] ^= 4
    return tensor


def bad_header(tensor):
    tensor = tensor.clone()
    tensor[50] = 0
    return tensor


def edited(old, new):
    """Replace text in the header by text of the same length."""
    assert len(old) == len(new)
    return lambda tensor: torch.frombuffer(bytearray(tensor.numpy().tobytes().replace(old, new)), dtype=torch.uint8)


EXPORTED = {
    "missing": (without(WEIGHT), "lacks 1 tensors"),
    "extra": (with_tensor(WEIGHT.replace("1", "7"), lambda _: torch.zeros(9, dtype=torch.uint8)), "without a place"),
    "cut": (with_tensor(WEIGHT, cut), "proj.dps_weight.* cannot be loaded: it is cut short"),
    "cut at the head": (with_tensor(WEIGHT, lambda old: old[:36].clone()), "header is cut short"),
    "empty": (with_tensor(WEIGHT, lambda old: old[:0].clone()), "neither a weight nor a difference"),
    "flipped": (with_tensor(WEIGHT, flipped), "cannot be loaded"),
    "bad header": (with_tensor(WEIGHT, bad_header), "header cannot be read"),
    "shape": (with_tensor(WEIGHT, edited(b"[8, 8]", b"[4, 8]")), r"its shape is \[4, 8\], the model's is \[8, 8\]"),
    "huge shape": (with_tensor(WEIGHT, edited(b'"shape": [8, 8]', b'"shape": [9**9]')), "header cannot be read"),
    "negative": (with_tensor(WEIGHT, edited(b"[8, 8]", b"[8,-8]")), "header cannot be read"),
    "dtype": (with_tensor(WEIGHT, edited(b'"float32"', b'"float31"')), "header cannot be read"),
    "another dtype": (with_tensor(WEIGHT, edited(b'"float32"', b'"float64"')), "difference to another pretrained"),
    "field": (with_tensor(WEIGHT, edited(b'"frames"', b'"fRAMES"')), "header cannot be read"),
    "version": (with_tensor(WEIGHT, edited(b"version 1", b"version 2")), "a newer peft_dps may have written it"),
    "two axes": (with_tensor(WEIGHT, lambda old: old[None]), "neither a weight nor a difference"),
}


@pytest.fixture(params=[*PLAIN, *(f"exported, {name}" for name in EXPORTED)])
def fault(request, mlp, tmp_path):
    """An adapter's folder with one fault, and what the error says."""
    model = mlp.model(init_weights=False)
    if request.param in PLAIN:
        model.save_pretrained(tmp_path)
        spoil, message = PLAIN[request.param]
    else:
        export_adapter(model, tmp_path)
        spoil, message = EXPORTED[request.param.removeprefix("exported, ")]
    save_file(
        {name: tensor.contiguous() for name, tensor in spoil(load_file(tmp_path / FILE)).items()}, tmp_path / FILE
    )
    return tmp_path, message


def assert_unchanged(model, before, mlp, output):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(mlp.output(model), output)


def test_a_state_dict_that_does_not_fit(fault, mlp, snapshot):
    path, message = fault
    model = mlp.model(init_weights=False)
    before, output = snapshot(model), mlp.output(model)
    with pytest.raises(AdapterFileError, match=message):
        set_peft_model_state_dict(model, load_file(path / FILE))
    assert_unchanged(model, before, mlp, output)


def test_loading_into_an_adapter_that_exists(fault, mlp, snapshot):
    path, message = fault
    model = mlp.model()
    mlp.train(model, steps=3)
    before, output = snapshot(model), mlp.output(model)
    with pytest.raises(AdapterFileError, match=message):
        model.load_adapter(path, "default")
    assert_unchanged(model, before, mlp, output)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_a_new_adapter_leaves_none_behind(fault, mlp, snapshot, low_cpu_mem_usage):
    path, message = fault
    model = mlp.model(init_weights=False)
    before, output = snapshot(model), mlp.output(model)
    with pytest.raises(AdapterFileError, match=message):
        model.load_adapter(path, "b", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert_unchanged(model, before, mlp, output)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_gives_the_base_model_back(fault, mlp, snapshot, low_cpu_mem_usage):
    path, message = fault
    base = mlp.base()
    before, output = snapshot(base), mlp.output(base)
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(base, path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(base.head) is torch.nn.Linear
    assert not [module for module in base.modules() if isinstance(module, DPSLayer)]
    assert_unchanged(base, before, mlp, output)


def test_an_adapter_of_ones_own_is_not_taken_out(mlp):
    model = mlp.model()
    with pytest.raises(AdapterFileError):
        set_peft_model_state_dict(model, {"base_model.model.head.weight": torch.zeros(3, 8),
                                          "base_model.model.head.bias": torch.zeros(3)})  # fmt: skip
    assert list(model.peft_config) == ["default"]
    assert [module for module in model.modules() if isinstance(module, DPSLayer)]


def test_an_adapter_trained_from_a_saved_configuration_is_not_taken_out(mlp, tmp_path):
    mlp.model(density=0.3).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(mlp.base(), config)
    mlp.train(model, steps=3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(AdapterFileError):
        set_peft_model_state_dict(model, {"base_model.model.head.weight": torch.zeros(3, 8),
                                          "base_model.model.head.bias": torch.zeros(3)})  # fmt: skip
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_missing_head_is_refused_by_peft(mlp, snapshot):
    model = mlp.model(init_weights=False)
    state = without("base_model.model.head.weight")(get_peft_model_state_dict(mlp.model()))
    before, output = snapshot(model), mlp.output(model)
    with pytest.raises(KeyError, match=r"head\.weight"):
        set_peft_model_state_dict(model, state)
    assert_unchanged(model, before, mlp, output)


def test_a_head_of_another_size_can_be_left_out(mlp, tmp_path):
    source = mlp.model(init_weights=False)
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    save_file({**state, "base_model.model.head.weight": torch.zeros(5, 8)}, tmp_path / FILE)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(mlp.base(), tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.state_dict()[WEIGHT + ".default"], source.state_dict()[WEIGHT + ".default"])


def test_tensors_of_unknown_names_are_told_of(mlp, caplog):
    model = mlp.model()
    state = {
        **get_peft_model_state_dict(mlp.model(init_weights=False)),
        "base_model.model.other.weight": torch.ones(2),
    }
    result = set_peft_model_state_dict(model, state)
    assert result.unexpected_keys == ["base_model.model.other.weight"]
    assert "tensors that the model lacks: base_model.model.other.weight" in caplog.text


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kept", [0, 4, 200, -100])
def test_a_file_cut_short_is_found_before_the_model_is_touched(mlp, tmp_path, kept, exported, snapshot):
    model = mlp.model(init_weights=False)
    export_adapter(model, tmp_path) if exported else model.save_pretrained(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:kept])
    base = mlp.base()
    before, output = snapshot(base), mlp.output(base)
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before, mlp, output)
    before, output = snapshot(model), mlp.output(model)
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        model.load_adapter(tmp_path, "b")
    assert_unchanged(model, before, mlp, output)
    assert list(model.peft_config) == ["default"]


def test_an_exported_adapter_refuses_another_base(mlp, tmp_path, snapshot):
    export_adapter(mlp.model(init_weights=False), tmp_path)
    base = mlp.base()
    base.body.layers[1]["proj"].weight.data[3, 4] += 1e-6
    before, output = snapshot(base), mlp.output(base)
    with pytest.raises(AdapterFileError, match=r"proj\.dps_weight.*difference to another pretrained weight"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before, mlp, output)


def test_an_exported_adapter_refuses_its_base_with_fewer_bits(mlp, tmp_path):
    export_adapter(mlp.model(init_weights=False), tmp_path)
    with pytest.raises(AdapterFileError, match="another pretrained weight"):
        PeftModel.from_pretrained(mlp.base().to(torch.bfloat16), tmp_path)


def edit_config(path, **fields):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def test_fields_of_a_later_version_are_left_out_with_a_warning(mlp, tmp_path):
    model = mlp.model(init_weights=False, density=0.25)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, a_field_of_tomorrow=3)
    with pytest.warns(UserWarning, match="a_field_of_tomorrow"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, DPSConfig)
    assert config.density == 0.25
    with pytest.warns(UserWarning, match="a_field_of_tomorrow"):
        loaded = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    assert torch.equal(mlp.output(loaded), mlp.output(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"variant": "newer"}, "`variant`"), ({"density": "0.5"}, "`density`"), ({"target_modules": [3]}, "`target_mod")],
)
def test_values_of_a_config_that_make_no_sense(mlp, tmp_path, fields, message):
    mlp.model().save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    base = mlp.base()
    with pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert not [module for module in base.modules() if isinstance(module, DPSLayer)]


def test_missing_fields_have_their_defaults(mlp, tmp_path):
    model = mlp.model(init_weights=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in ("density", "scope", "frozen", "score", "seed"):
        del config[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    assert loaded.peft_config["default"].density == DPSConfig().density
    assert torch.equal(mlp.output(loaded), mlp.output(model))


def test_a_loaded_adapter_that_is_there_stays_when_the_next_load_fails(mlp, tmp_path, snapshot):
    mlp.model(init_weights=False).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    before, output = snapshot(loaded), mlp.output(loaded)
    state = without(WEIGHT)(load_file(tmp_path / FILE))
    save_file(state, tmp_path / FILE)
    with pytest.raises(AdapterFileError):
        loaded.load_adapter(tmp_path, "default")
    assert_unchanged(loaded, before, mlp, output)
    trained = get_peft_model(mlp.base(), mlp.config())
    assert list(trained.peft_config) == ["default"]
