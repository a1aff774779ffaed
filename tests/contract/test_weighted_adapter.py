"""`add_weighted_adapter`: adapters as arithmetic on their differences to the pretrained weights."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper

from peft_dps import DPSConfig, DPSLayer
from peft_dps.errors import ConfigError, TargetError
from tests.contract.conftest import TOKENS, Case
from tests.contract.test_parameters import EXPERTS, make_mixtral
from tests.device import DEVICE

pytestmark = [pytest.mark.device, pytest.mark.supports("Adapters", "`add_weighted_adapter`, linear (task arithmetic)")]
TERMS = {"default": 0.75, "other": -0.5}


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


@pytest.fixture
def two(case):
    model = case.model(init_weights=False)
    model.add_adapter("other", case.config(init_weights=False))
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                torch.nn.init.normal_(copy.weight)
    return model


def expected(pretrained, tensors):
    return pretrained + sum(factor * (tensors[name] - pretrained) for name, factor in TERMS.items())


def test_the_deltas_are_added_with_their_factors(two):
    two.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    for layer in dps_layers(two):
        base = layer.get_base_layer()
        torch.testing.assert_close(layer.dps_weight["sum"], expected(base.weight, layer.dps_weight))
        if getattr(base, "bias", None) is not None:
            torch.testing.assert_close(layer.dps_bias["sum"], expected(base.bias, layer.dps_bias))


def test_copies_of_modules_to_save_are_combined_alike(two, case):
    two.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    wrappers = [module for module in two.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert len(wrappers) == (case.name != "gpt2")
    for wrapper in wrappers:
        weights = {name: copy.weight for name, copy in wrapper.modules_to_save.items()}
        torch.testing.assert_close(weights["sum"], expected(wrapper.original_module.weight, weights))


def test_one_adapter_with_factor_one_is_that_adapter_to_the_bit(two, case):
    two.add_weighted_adapter(["other"], [1.0], "same")
    two.add_weighted_adapter(["other"], [0.0], "nothing")
    two.set_adapter("other")
    other = case.output(two)
    two.set_adapter("same")
    assert torch.equal(case.output(two), other)
    two.set_adapter("nothing")
    torch.testing.assert_close(case.output(two), case.output(case.base()), rtol=1e-5, atol=1e-6)


def test_a_sum_is_what_both_compute_when_active_together(case):
    options = {"modules_to_save": None, "init_weights": False, "task_type": None}
    model = get_peft_model(case.base(), case.config(**options)).eval()
    model.add_adapter("other", case.config(**options))
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    model.base_model.set_adapter(["default", "other"])
    together = case.output(model)
    model.set_adapter("sum")
    torch.testing.assert_close(case.output(model), together, rtol=1e-4, atol=1e-5)


def test_the_sources_and_the_active_adapter_stay(two, case, snapshot):
    before, output = snapshot(two), case.output(two)
    trainable = {name for name, p in two.named_parameters() if p.requires_grad}
    two.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    after = snapshot(two)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert two.active_adapters == ["default"]
    assert torch.equal(case.output(two), output)
    assert {name for name, p in two.named_parameters() if p.requires_grad} == trainable


def test_the_new_adapter_trains_saves_and_loads(two, case, tmp_path):
    two.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    two.set_adapter("sum")
    case.train(two, steps=4)
    assert two.dps_status("sum").engaged
    assert two.dps_status("default").steps == 0
    two.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "sum").eval()
    assert torch.equal(case.output(loaded), case.output(two))


def test_adapters_on_different_layers_are_combined(mlp):
    options = {"modules_to_save": None, "init_weights": False, "target_modules": ["fc", "proj"]}
    model = get_peft_model(mlp.base(), mlp.config(**{**options, "target_modules": ["fc"]}, train_bias=False)).eval()
    model.add_adapter("other", mlp.config(**options, layers_to_transform=[1]))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum")
    first, second = (layer for layer in model.base_model.model.body.layers)
    assert "sum" not in getattr(first["proj"], "dps_weight", {})
    assert torch.equal(first["fc"].dps_weight["sum"], first["fc"].dps_weight["default"])
    assert torch.equal(first["fc"].dps_bias["sum"], first["fc"].base_layer.bias)
    base = second["proj"].base_layer.weight
    torch.testing.assert_close(second["proj"].dps_weight["sum"], (base + second["proj"].dps_weight["other"]) / 2)
    torch.testing.assert_close(
        second["fc"].dps_bias["sum"], (second["fc"].base_layer.bias + second["fc"].dps_bias["other"]) / 2
    )


def test_a_merged_model_is_unmerged_first(mlp):
    """As PEFT does whenever an adapter is added."""
    plain, merged = mlp.model(init_weights=False), mlp.model()
    merged.load_state_dict(plain.state_dict())
    merged.merge_adapter()
    plain.add_weighted_adapter(["default"], [0.5], "halved")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        merged.add_weighted_adapter(["default"], [0.5], "halved")
    for mine, theirs in zip(dps_layers(merged), dps_layers(plain), strict=True):
        assert torch.equal(mine.dps_weight["halved"], theirs.dps_weight["halved"])
        assert not mine.merged


def test_tied_copies_stay_tied(gpt2):
    model = gpt2.model(train_remaining=True)
    gpt2.train(model, steps=2)
    model.add_weighted_adapter(["default"], [0.5], "halved")
    model.set_adapter("halved")
    inner, base = model.base_model.model, gpt2.base()
    assert inner.lm_head.weight is inner.transformer.wte.weight
    trained = inner.transformer.wte.modules_to_save["default"].weight
    torch.testing.assert_close(inner.lm_head.weight, (base.lm_head.weight + trained) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "none"], [1, 1], "new"), r"`adapters` must be some of \['default', 'other'\], got \['none'\]"),
        ((["default"], [1, 1], "new"), "`adapters` needs one factor each in `weights`, got 1 and 2"),
        (([], [], "new"), "got 0 and 0"),
        ((["default"], [1], "other"), "there is an adapter 'other' already"),
        ((["default"], [float("nan")], "new"), "`weights` must be finite"),
        ((["default"], [1], "new", "svd"), "`combination_type` must be 'linear', got 'svd'"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(mlp, arguments, message, snapshot):
    model = mlp.model()
    model.add_adapter("other", mlp.config())
    before = set(snapshot(model))
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "other"}
    assert set(snapshot(model)) == before


def test_a_combined_adapter_of_experts_is_saved_and_loaded(tmp_path):
    case = Case("experts", make_mixtral, TOKENS, {"target_modules": ["q_proj"], "target_parameters": EXPERTS})
    model = case.model(init_weights=False)
    model.add_adapter("other", DPSConfig(target_modules=["v_proj"], init_weights=False))
    model.add_weighted_adapter(["other", "default"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    output = case.output(model)
    entries = [model.dps_status(name).entries for name in ("default", "other", "sum")]
    assert entries[2] == entries[0] + entries[1]
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "sum").eval()
    assert torch.equal(case.output(loaded), output)
    assert loaded.dps_status().entries == entries[2]


class Nested(torch.nn.Module):
    """Modules whose paths end alike or look like those of wrappers."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)
        self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})
        self.base_layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.base_layer_proj = torch.nn.Linear(4, 4)


def test_a_combined_adapter_has_the_targets_of_its_parts_and_no_others():
    model = get_peft_model(Nested(), DPSConfig(target_modules=r"proj|base_layers\.0|base_layer_proj"))
    model.add_weighted_adapter(["default"], [1.0], "same")
    layers = [
        key for key, layer in model.named_modules() if isinstance(layer, DPSLayer) and "same" in layer.dps_weight
    ]
    assert layers == ["base_model.model." + name for name in ("proj", "base_layers.0", "base_layer_proj")]


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(2, 4, 4))
        self.router = torch.nn.Linear(4, 2)

    def forward(self, x):
        return torch.einsum("bi,eij,be->bj", x, self.up, self.router(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["router"]}, "The target 'experts.router' cannot be for another adapter"),
        (
            {"target_modules": ["norm"], "train_remaining": True},
            "`train_remaining=True` cannot be for another adapter",
        ),
    ],
)
def test_what_lies_in_a_wrapped_module_is_out_of_reach_for_a_second_adapter(fields, message):
    base = torch.nn.Sequential()
    base.add_module("norm", torch.nn.Linear(4, 4))
    base.add_module("experts", Experts())
    model = get_peft_model(base, DPSConfig(target_parameters=["experts.up"], **fields)).eval()
    inputs = torch.randn(3, 4, device=DEVICE)
    output, before = model(inputs), [key for key, _ in model.named_modules()]
    with pytest.raises(TargetError, match=message):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]
    assert [key for key, _ in model.named_modules()] == before
    assert torch.equal(model(inputs), output)
