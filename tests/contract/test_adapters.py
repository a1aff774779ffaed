"""Adding, switching, combining, disabling and deleting adapters, and what PEFT reports of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model, get_peft_model_state_dict

from peft_dps import DPSLayer, Stage
from peft_dps.errors import ConfigError
from tests.device import DEVICE

pytestmark = pytest.mark.device


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


@pytest.fixture
def plain(case):
    """The case without `modules_to_save`, of which PEFT lets only one adapter be active."""
    options = {"modules_to_save": None, "init_weights": False, **({"task_type": None} if case.name == "bert" else {})}
    return lambda **more: case.config(**{**options, **more})


@pytest.mark.supports("Layers", "disables to the bit", row="case")
def test_disabled_adapters_leave_the_base_bit_for_bit(case):
    expected = case.output(case.base())
    model = case.model(init_weights=False)
    case.train(model, steps=3)
    trained = case.output(model)
    with model.disable_adapter():
        assert torch.equal(case.output(model), expected)
    assert not torch.equal(trained, expected)
    assert torch.equal(case.output(model), trained)


@pytest.mark.supports("Adapters", "several adapters, switched by `set_adapter`")
def test_switching_adapters(case):
    model = case.model(init_weights=False)
    first = case.output(model)
    model.add_adapter("other", case.config(init_weights=False))
    assert model.active_adapters == ["default"]
    assert torch.equal(case.output(model), first)
    model.set_adapter("other")
    other = case.output(model)
    assert not torch.allclose(first, other)
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)


@pytest.mark.supports("Layers", "several active", row="case")
def test_several_active_adapters_are_the_base_plus_their_deltas(case, plain):
    model = get_peft_model(case.base(), plain()).eval()
    model.add_adapter("other", plain(train_bias=False))
    model.base_model.set_adapter(["default", "other"])
    for layer in dps_layers(model):
        base = layer.get_base_layer()
        deltas = sum(layer.dps_weight[name] - base.weight for name in ("default", "other"))
        torch.testing.assert_close(layer.weight, base.weight + deltas)
        if getattr(base, "bias", None) is not None:
            torch.testing.assert_close(layer.bias, layer.dps_bias["default"])
    both = case.output(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(case.output(merged), both, rtol=1e-5, atol=1e-5)


@pytest.mark.supports("Adapters", "adapters on different layers")
def test_adapters_on_different_layers_do_not_meet(mlp):
    model = get_peft_model(mlp.base(), mlp.config(target_modules=["fc"], modules_to_save=None, init_weights=False))
    model.add_adapter("other", mlp.config(target_modules=["proj"], modules_to_save=None, init_weights=False))
    block = model.base_model.model.body.layers[0]
    assert set(block["fc"].dps_weight) == {"default"}
    assert set(block["proj"].dps_weight) == {"other"}
    x = torch.randn(3, 8, device=DEVICE)
    assert torch.equal(block["proj"](x), block["proj"].base_layer(x))
    model.set_adapter("other")
    assert not torch.equal(block["proj"](x), block["proj"].base_layer(x))
    assert torch.equal(block["fc"](x), block["fc"].base_layer(x))


@pytest.mark.supports("Adapters", "deleting adapters, inactive, active and the last one")
def test_delete_the_inactive_adapter(case):
    model = case.model(init_weights=False)
    expected = case.output(model)
    model.add_adapter("other", case.config(init_weights=False))
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if "other" in name]
    assert torch.equal(case.output(model), expected)
    for layer in dps_layers(model):
        assert "other" not in layer.dps_controllers
    with pytest.raises(ConfigError, match="other"):
        model.dps_status("other")


@pytest.mark.supports("Adapters", "deleting adapters, inactive, active and the last one")
def test_delete_the_active_adapter(mlp):
    model = get_peft_model(mlp.base(), mlp.config(modules_to_save=None)).eval()
    model.add_adapter("other", mlp.config(modules_to_save=None, init_weights=False))
    model.set_adapter("other")
    other = mlp.output(model)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert not torch.equal(mlp.output(model), other)
    torch.testing.assert_close(mlp.output(model), mlp.output(mlp.base()))
    mlp.train(model, steps=3)
    assert model.dps_status().steps == 3


@pytest.mark.supports("Adapters", "deleting adapters, inactive, active and the last one")
def test_delete_the_last_adapter(mlp):
    model = mlp.model(init_weights=False)
    model.delete_adapter("default")
    assert torch.equal(mlp.output(model.base_model.model), mlp.output(mlp.base()))


def test_a_deleted_name_can_be_used_again_and_starts_anew(mlp):
    model = mlp.model()
    mlp.train(model, steps=3)
    model.add_adapter("other", mlp.config())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", mlp.config(stage_steps=1))
    model.set_adapter("default")
    assert model.dps_status("default").steps == 0
    mlp.train(model, steps=2)
    assert model.dps_status("default").stage_steps == 1
    assert model.dps_status("default").engaged
    assert model.dps_status("other").steps == 0


@pytest.mark.supports("Adapters", "names that are parts of other names")
def test_names_that_are_parts_of_other_names(case):
    model = get_peft_model(case.base(), case.config(init_weights=False), adapter_name="a").eval()
    names = ["a", "aa", "a_b", "dps_weight_a"]
    for name in names[1:]:
        model.add_adapter(name, case.config(init_weights=False))
    outputs = {}
    for name in names:
        model.set_adapter(name)
        outputs[name] = case.output(model)
    for name in names:
        state_dict = get_peft_model_state_dict(model, adapter_name=name)
        weights = {value.data_ptr() for key, value in state_dict.items() if key.endswith(".dps_weight")}
        assert weights == {layer.dps_weight[name].data_ptr() for layer in dps_layers(model)}
    model.delete_adapter("aa")
    for name in ("a", "a_b", "dps_weight_a"):
        model.set_adapter(name)
        assert torch.equal(case.output(model), outputs[name])


@pytest.mark.supports("Adapters", "`get_layer_status`, `get_model_status`")
def test_layer_and_model_status(case):
    model = case.model()
    model.add_adapter("other", case.config())
    layers = [status for status in get_layer_status(model) if status.module_type.startswith("dps.")]
    assert len(layers) == len(dps_layers(model))
    for status in layers:
        assert status.enabled
        assert status.active_adapters == ["default"]
        assert status.available_adapters == ["default", "other"]
        assert status.requires_grad == {"default": True, "other": False}
        assert status.merged_adapters == []
    status = get_model_status(model)
    assert status.adapter_model_type == "DPSModel"
    assert status.peft_types == {"default": "DPS", "other": "DPS"}
    assert status.requires_grad == {"default": True, "other": False}
    assert status.enabled
    model.merge_adapter()
    layers = [status for status in get_layer_status(model) if status.module_type.startswith("dps.")]
    assert {tuple(status.merged_adapters) for status in layers} == {("default",)}


@pytest.mark.supports("Adapters", "`print_trainable_parameters`")
def test_print_trainable_parameters(case, capsys):
    model = case.model()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = case.base()
    assert total == trainable + sum(p.numel() for p in base.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


def test_trainable_parameters_of_columns_are_those_selected_and_of_copies_those_scored(mlp):
    columns = {
        "storage": "compact",
        "granularity": "column",
        "schedule": "once",
        "score_steps": 1,
        "train_bias": False,
    }
    for fields, selects in (({"units": 2, **columns}, True), ({"train_bias": False}, False)):
        model = mlp.model(**fields)
        head = sum(p.numel() for name, p in model.named_parameters() if "modules_to_save" in name)
        before = model.get_nb_trainable_parameters()
        assert f"{model.dps_status().entries} entries targeted" in str(model.dps_status())
        mlp.train(model, steps=3)
        status = model.dps_status()
        assert status.stage is Stage.SUBNETWORK
        assert model.get_nb_trainable_parameters() == before
        assert before[0] - head == (status.selected if selects else status.entries)


@pytest.mark.refuses(
    "Adapters",
    "an adapter per sample (`adapter_names`)",
    "PEFT has it for LoRA only",
)
def test_an_adapter_per_sample_is_refused_instead_of_ignored(gpt2):
    model = gpt2.model()
    model.add_adapter("other", gpt2.config())
    with pytest.raises(ConfigError, match="adapter_names"):
        model(gpt2.inputs, adapter_names=["default", "other"])


@pytest.mark.supports("Adapters", "`set_requires_grad`")
def test_requires_grad_can_be_set_per_adapter(mlp):
    model = mlp.model()
    model.add_adapter("other", mlp.config())
    model.set_requires_grad("other")
    model.set_requires_grad("default", requires_grad=False)
    for layer in dps_layers(model):
        assert layer.dps_weight["other"].requires_grad
        assert not layer.dps_weight["default"].requires_grad


def test_a_repr_names_the_tuner(case):
    assert repr(dps_layers(case.model())[0]).startswith("dps.")


def test_every_layer_tells_its_sizes(case, input_of):
    for layer in dps_layers(case.model()):
        convolves = hasattr(layer.get_base_layer(), "kernel_size")
        assert layer(input_of(layer)).shape[1 if convolves else -1] == layer.out_features
    shapes = {(layer.in_features, layer.out_features) for layer in dps_layers(case.model())}
    assert shapes == {"mlp": {(8, 8)}, "bert": {(16, 16), (16, 24), (24, 16)},
                      "gpt2": {(16, 48), (16, 16), (16, 64), (64, 16)},
                      "conv": {(4, 8), (8, 8), (1, 2), (8, 6)}, "text": {(16, 8), (6, 8)}}[case.name]  # fmt: skip
