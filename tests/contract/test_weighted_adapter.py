"""`add_weighted_adapter`: adapters as arithmetic on their differences to the pretrained weights."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper

from peft_dps import DPSConfig, DPSLayer, export_adapter
from peft_dps.errors import ConfigError, TargetError
from tests.contract.conftest import CASES, TOKENS, Case
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


COMPACT = {"storage": "compact", "schedule": "every", "score_steps": 1, "stage_steps": 2, "train_bias": False}
KINDS = {
    "column": {"granularity": "column", "units": 2},
    "row": {"granularity": "row", "density": 0.25},
    "entry": {"granularity": "entry", "density": 0.1},
    "tensor": {"granularity": "tensor", "density": 0.4},
    "block": {"granularity": "block", "density": 0.6},
}
UNITS_OF_A_CASE = [(case, kind) for case in CASES for kind in KINDS if (case.name, kind) != ("conv", "column")]


def compact_two(case, kind, **options):
    """Train two compact adapters, each with units that it trains no more."""
    own = {**COMPACT, **KINDS[kind], **options}
    model = case.model(**own)
    model.add_adapter("other", case.config(**{**own, "score": "random", "seed": 3}))
    for name in ("default", "other"):
        model.set_adapter(name)
        case.train(model, steps=6)
    model.set_adapter("default")
    return model


def held(layer, name):
    delta = layer.delta(name)
    return set(delta.held.tolist()), set(delta.index.tolist())


@pytest.mark.parametrize(("case", "kind"), UNITS_OF_A_CASE, ids=lambda value: getattr(value, "name", value))
def test_compact_adapters_are_combined_unit_by_unit(case, kind):
    model = compact_two(case, kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert any(layer.get_delta_weight("sum").any() for layer in dps_layers(model))
    for layer in dps_layers(model):
        total = sum(factor * layer.get_delta_weight(name) for name, factor in TERMS.items())
        torch.testing.assert_close(layer.get_delta_weight("sum"), total, rtol=1e-5, atol=1e-6)
        (mine, trained), (first, its), (second, theirs) = (held(layer, name) for name in ("sum", "default", "other"))
        assert (mine, trained) == (first | second, its | theirs)
    model.set_adapter("sum")
    assert torch.isfinite(case.output(model)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_compact_adapter_with_factor_one_is_that_adapter_to_the_bit(mlp, kind):
    model = compact_two(mlp, kind)
    model.add_weighted_adapter(["other"], [1.0], "same")
    model.add_weighted_adapter(["other"], [0.0], "nothing")
    outputs = {}
    for name in ("other", "same", "nothing"):
        model.set_adapter(name)
        outputs[name] = mlp.output(model)
    for layer in dps_layers(model):
        assert torch.equal(layer.get_delta_weight("same"), layer.get_delta_weight("other"))
        assert not layer.get_delta_weight("nothing").any()
    assert torch.equal(outputs["same"], outputs["other"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_compact_sum_is_merged_saved_and_trained_on(mlp, kind, tmp_path):
    model = compact_two(mlp, kind)
    model.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    model.set_adapter("sum")
    output = mlp.output(model)
    model.merge_adapter()
    torch.testing.assert_close(mlp.output(model), output, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path / "sum", is_trainable=True).eval()
    assert torch.equal(mlp.output(loaded), output)
    for each, name in ((model, "sum"), (loaded, "default")):
        mlp.train(each, steps=4)
        assert each.dps_status(name).engaged
        assert not torch.equal(mlp.output(each), output)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_compact_sum_is_a_lora(mlp, kind, tmp_path):
    model = compact_two(mlp, kind, modules_to_save=None)
    assert any(layer.delta("other").kept is not None for layer in dps_layers(model))
    model.add_weighted_adapter(list(TERMS), list(TERMS.values()), "sum")
    model.set_adapter("sum")
    report = export_adapter(model, tmp_path, form="lora")
    assert report.rank == max(len(held(layer, "sum")[0]) for layer in dps_layers(model))
    served = PeftModel.from_pretrained(mlp.base(), tmp_path / "sum").eval()
    torch.testing.assert_close(mlp.output(served), mlp.output(model), rtol=1e-6, atol=1e-6)


def test_a_compact_sum_fits_layers_that_the_first_adapter_lacks():
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    options = {**COMPACT, "granularity": "row"}
    model = get_peft_model(base, DPSConfig(target_modules=["0", "1"], units=4, **options))
    model.add_adapter("small", DPSConfig(target_modules=["2"], units=1, **options))
    case = Case("stack", lambda: base, torch.linspace(-1, 1, 32).view(4, 8))
    for name in ("default", "small"):
        model.set_adapter(name)
        case.train(model, steps=2)
    model.add_weighted_adapter(["default", "small"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].units == 1
    assert [layer.delta("sum").slots for layer in dps_layers(model)] == [4, 4, 1]
    model.add_adapter("dense", DPSConfig(target_modules=["2"], density=0.5, **options))
    model.add_weighted_adapter(["default", "dense"], [1.0, 1.0], "both")
    assert (model.peft_config["both"].units, model.peft_config["both"].density) == (None, 0.5)


@pytest.mark.parametrize(
    ("fields", "field", "values"),
    [
        ({"storage": "copy"}, "storage", ("compact", "copy")),
        ({**COMPACT, **KINDS["row"]}, "granularity", ("column", "row")),
    ],
)
def test_adapters_of_different_kinds_are_not_combined(mlp, fields, field, values):
    model = mlp.model(**{**COMPACT, **KINDS["column"]})
    model.add_adapter("other", mlp.config(**fields))
    message = f"must have the same `{field}`, and 'default' has '{values[0]}', 'other' '{values[1]}'"
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"default", "other"}


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
