"""Merging is exact, can be undone to the bit, and refuses broken adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict

from peft_dps import DPSLayer
from peft_dps.errors import ConfigError
from tests.device import DEVICE

pytestmark = pytest.mark.device


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


def base_tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".base_layer." in name}


@pytest.fixture
def two(case):
    """A model with two perturbed adapters that cover the same layers, and no `modules_to_save` to choose between."""
    options = {"modules_to_save": None, "init_weights": False}
    if case.name == "bert":
        options["task_type"] = None
    model = get_peft_model(case.base(), case.config(**options)).eval()
    model.add_adapter("other", case.config(**options, train_bias=False))
    return model


def test_merged_output_is_the_adapters(case):
    model = case.model(init_weights=False)
    expected = case.output(model)
    model.merge_adapter()
    assert all(layer.merged for layer in dps_layers(model))
    torch.testing.assert_close(case.output(model), expected, rtol=1e-5, atol=1e-6)
    for layer in dps_layers(model):
        assert torch.equal(layer.get_base_layer().weight, layer.dps_weight["default"])


@pytest.mark.supports("Merging", "`merge_adapter`, and `unmerge_adapter` to the bit, in fp32, bf16 and fp16")
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_is_exact_to_the_bit(case, two, dtype, safe_merge):
    two = two.to(dtype)
    before = base_tensors(two)
    two.merge_adapter(["default", "other"], safe_merge=safe_merge)
    merged = base_tensors(two)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert all(not torch.equal(merged[name], before[name]) for name in before if name.endswith("weight"))
    two.unmerge_adapter()
    after = base_tensors(two)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(layer.merged for layer in dps_layers(two))


@pytest.mark.supports("Merging", "several adapters, at once or one by one")
def test_merging_one_by_one_is_merging_at_once(two):
    two.merge_adapter(["default", "other"])
    at_once = base_tensors(two)
    two.unmerge_adapter()
    two.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        two.merge_adapter(["other"])
    assert all(torch.equal(tensor, at_once[name]) for name, tensor in base_tensors(two).items())


def test_several_merged_adapters_add_their_deltas(two):
    deltas = [
        sum(layer.get_delta_weight(name) for name in ("default", "other")) + layer.get_base_layer().weight
        for layer in dps_layers(two)
    ]
    two.merge_adapter(["default", "other"])
    for layer, expected in zip(dps_layers(two), deltas, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight.data, expected.data)


@pytest.mark.supports("Merging", "merging twice: a warning, and nothing changes")
def test_merging_twice_warns_and_changes_nothing(case):
    model = case.model(init_weights=False)
    model.merge_adapter()
    before = base_tensors(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())


def test_unmerging_the_unmerged_warns(mlp):
    model = mlp.model()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.supports("Merging", "`safe_merge` finds NaN and infinity")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("container", ["dps_weight", "dps_bias"])
def test_safe_merge_refuses_broken_adapters_and_changes_nothing(case, container, value):
    model = case.model()
    layer = dps_layers(model)[0]
    if not getattr(layer, container):
        pytest.skip("an embedding has no bias")
    with torch.no_grad():
        getattr(layer, container)["default"].view(-1)[0] = value
    before = base_tensors(model)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.supports("Merging", "`safe_merge` finds NaN and infinity")
def test_safe_merge_of_several_adapters_finds_the_broken_one(case, two):
    before = base_tensors(two)
    with torch.no_grad():
        dps_layers(two)[-1].dps_weight["other"].view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        two.merge_adapter(["default", "other"], safe_merge=True)
    assert not dps_layers(two)[-1].merged
    for layer in dps_layers(two)[:-1]:  # PEFT merges layer by layer; those before the broken one can be unmerged
        layer.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(two).items())
    two.merge_adapter(["default"], safe_merge=True)
    assert all(layer.merged_adapters == ["default"] for layer in dps_layers(two))


@pytest.mark.supports("Merging", "`safe_merge` finds NaN and infinity")
def test_what_overflows_in_the_dtype_of_the_base_is_refused(mlp):
    model = get_peft_model(mlp.base().half(), mlp.config())
    layer = dps_layers(model)[0]
    with torch.no_grad():
        layer.dps_weight["default"][0, 0] = 1e6
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_training_after_merging_does_not_touch_the_merged_weight(mlp):
    model = mlp.model(init_weights=False)
    model.merge_adapter()
    before = base_tensors(model)
    with torch.no_grad():
        for layer in dps_layers(model):
            layer.dps_weight["default"].zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())


def test_disabling_unmerges(case):
    model = case.model(init_weights=False)
    expected = case.output(case.base())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.output(model), expected)


@pytest.mark.supports("Layers", "merges", row="case")
@pytest.mark.parametrize("progressbar", [False, True])
def test_merge_and_unload_gives_a_plain_model(case, progressbar):
    model = case.model(init_weights=False)
    expected = case.output(model)
    merged = model.merge_and_unload(progressbar=progressbar)
    assert type(merged) is type(case.base())
    assert not dps_layers(merged)
    assert set(merged.state_dict()) == set(case.base().state_dict())
    torch.testing.assert_close(case.output(merged), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.supports("Merging", "`merge_and_unload`, of named adapters too")
def test_merge_and_unload_of_named_adapters(case, two):
    two.base_model.set_adapter(["default", "other"])
    expected = case.output(two)
    two.base_model.set_adapter("default")
    merged = two.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(case.output(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.supports("Merging", "`unload` gives the base back to the bit")
def test_unload_gives_the_base_back_bit_for_bit(case):
    model = case.model(init_weights=False)
    case.train(model, steps=3)
    unloaded = model.unload()
    assert not dps_layers(unloaded)
    expected = case.base().state_dict()
    actual = unloaded.state_dict()
    assert set(actual) == set(expected)
    saved = {"bert": "classifier", "gpt2": "nothing"}.get(case.name, "head")
    assert all(torch.equal(actual[name], expected[name]) for name in expected if not name.startswith(saved))


def test_unload_after_merging_gives_the_merged_weights(mlp):
    """As every tuner of PEFT does."""
    model = mlp.model(init_weights=False)
    expected = mlp.output(model)
    model.merge_adapter()
    torch.testing.assert_close(mlp.output(model.unload()), expected, rtol=1e-5, atol=1e-6)


def test_merged_half_precision_bases_keep_their_dtype_and_output(transformer):
    config = transformer.config(init_weights=False)
    model = get_peft_model(transformer.base().to(torch.bfloat16), config).eval()
    expected = transformer.output(model)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(transformer.output(merged), expected, rtol=2e-2, atol=2e-2)


def test_a_merged_layer_moves_and_casts_whole(mlp):
    model = mlp.model(init_weights=False)
    before = base_tensors(model)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    for name, tensor in base_tensors(model).items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, before[name].double())


def test_merging_leaves_no_graph(mlp):
    model = mlp.model(init_weights=False)
    model.merge_adapter()
    for layer in dps_layers(model):
        assert not layer.get_base_layer().weight.requires_grad
        assert layer.get_base_layer().weight.grad_fn is None


@pytest.mark.supports("Merging", "`convert_to_lora`, of linear layers")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_conversion_to_lora_recovers_low_rank_deltas(gpt2, mlp):
    for case in (gpt2, mlp):
        model = case.model(train_bias=False, modules_to_save=None)
        with torch.no_grad():
            for layer in dps_layers(model):
                weight = layer.dps_weight["default"]
                weight += 0.2 * (torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])).to(DEVICE)
        expected = case.output(model)
        config, state_dict = convert_to_lora(model, rank=2)
        lora = get_peft_model(case.base(), config).eval()
        set_peft_model_state_dict(lora, state_dict)
        torch.testing.assert_close(case.output(lora), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_conversion_to_lora_refuses_trained_biases(mlp):
    model = mlp.model(modules_to_save=None)
    convert_to_lora(model, rank=2)  # nothing has been trained yet
    with torch.no_grad():
        dps_layers(model)[0].dps_bias["default"] += 1
    with pytest.raises(ConfigError, match=r"no place for biases, and adapter 'default'.*`train_bias=False`"):
        convert_to_lora(model, rank=2)


def test_the_check_before_merging_is_of_the_adapters_that_are_named(two, monkeypatch):
    two.set_adapter("default")
    checked = []
    monkeypatch.setattr(DPSLayer, "check_mergeable", lambda layer, names: checked.append(tuple(names)))
    two.merge_adapter(["other"])
    two.unmerge_adapter()
    assert set(checked) == {("other",)}
    checked.clear()
    with two.disable_adapter():
        two.merge_and_unload(adapter_names=["other"])
    assert set(checked) == {("other",)}


def test_tied_heads_stay_out_of_all_linear(gpt2):
    merged = gpt2.model(init_weights=False).merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert torch.equal(merged.lm_head.weight, gpt2.base().lm_head.weight)


def test_merging_leaves_the_saved_adapter_alone(mlp, tmp_path):
    model = mlp.model(init_weights=False)
    expected = mlp.output(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    torch.testing.assert_close(mlp.output(loaded), expected, rtol=1e-5, atol=1e-6)
