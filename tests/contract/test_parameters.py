"""Single parameters as targets: the weights of experts, which are no modules."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_dps import DPSConfig, DPSLayer, Stage
from peft_dps.errors import ConfigError, TargetError
from peft_dps.masking.noise import ColumnNoise
from tests.contract.conftest import TOKENS, Case
from tests.device import DEVICE
from tests.reference import ReferenceMix

pytestmark = pytest.mark.device

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def make_mixtral(**options):
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **options))
    if not any(name.endswith(EXPERTS[0]) for name, _ in model.named_parameters()):
        pytest.skip("needs transformers 5: experts of Mixtral as one parameter")
    return model


def make_llama4():
    model = Llama4ForCausalLM(
        Llama4TextConfig(**{**SIZES, "num_experts_per_tok": 1}, intermediate_size_mlp=12, interleave_moe_layer_step=1)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def make_gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SIZES, layer_types=["full_attention"] * 2, sliding_window=8))


def case_of(name, make, **options):
    return Case(name, make, TOKENS, {"target_modules": [], "target_parameters": EXPERTS, **options})


CASES = [
    case_of("mixtral", make_mixtral),
    case_of("llama4", make_llama4),
    case_of("gpt-oss", make_gpt_oss),
    case_of("with linear layers", make_mixtral, target_modules=["q_proj", "v_proj"]),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture
def mixtral():
    return CASES[0]


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DPSLayer)}


def test_a_fresh_adapter_changes_nothing_and_covers_the_experts(case):
    model = case.model()
    torch.testing.assert_close(case.output(model), case.output(case.base()), rtol=1e-6, atol=1e-6)
    block = "feed_forward" if case.name == "llama4" else "mlp"
    expected = {f"model.layers.{index}.{block}.{name}" for index in (0, 1) for name in EXPERTS}
    assert {name for name in model.dps_status().layers if "experts" in name} == expected
    assert model.dps_status().entries == sum(layer.entries for layer in layers(model).values())


def test_training_follows_the_stages_and_touches_nothing_else(case, snapshot):
    model = case.model()
    before = snapshot(model)
    case.train(model, steps=4)
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".dps_" in name for name in changed)
    assert {name for name in before if "dps_weight" in name} <= changed
    status = model.dps_status()
    assert (status.stage, status.selected_fraction, status.frozen_moved) == (Stage.SUBNETWORK, 0.5, False)
    with model.disable_adapter():
        assert torch.equal(case.output(model), case.output(case.base()))


def test_dense_at_full_density_is_fine_tuning_of_the_parameters(mixtral):
    model = mixtral.model(density=1.0)
    plain = mixtral.base()
    plain.requires_grad_(False)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith(tuple(EXPERTS)))
    for trained in (model, plain):
        mixtral.train(trained, steps=4)
    for key, layer in layers(model).items():
        path = key.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(layer.dps_weight["default"], plain.get_parameter(f"{path}.{layer.parameter_name}"))
    assert torch.equal(mixtral.output(model), mixtral.output(plain))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_every_way_to_compute_experts_sees_the_adapter(implementation):
    case = case_of(implementation, lambda: make_mixtral(experts_implementation=implementation))
    model = case.model(init_weights=False)
    base = case.base()
    for key, layer in layers(model).items():
        path = key.removeprefix("base_model.model.").replace(".base_layer", "")
        base.get_parameter(f"{path}.{layer.parameter_name}").data = layer.dps_weight["default"].data
    assert torch.equal(case.output(model), case.output(base))


def test_save_load_merge_unmerge_unload(case, tmp_path):
    model = case.model(init_weights=False)
    expected = case.output(model)
    base = case.output(case.base())
    assert not torch.allclose(expected, base, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(case.output(loaded), expected)
    model.merge_adapter()
    torch.testing.assert_close(case.output(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.output(model), base)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not layers(merged)
    assert set(merged.state_dict()) == set(case.base().state_dict())
    torch.testing.assert_close(case.output(merged), expected, rtol=1e-5, atol=1e-5)
    unloaded = model.unload()
    assert set(unloaded.state_dict()) == set(case.base().state_dict())
    assert torch.equal(case.output(unloaded), base)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_two_adapters(case, tmp_path, low_cpu_mem_usage):
    model = case.model(init_weights=False)
    first = case.output(model)
    model.add_adapter("other", case.config(init_weights=False))
    assert len(layers(model)) == len(layers(case.model()))
    model.set_adapter("other")
    other = case.output(model)
    assert not torch.allclose(first, other)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.base_model.set_adapter(["default", "other"])
    both = case.output(model)
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)
    fresh = case.model()
    fresh.load_adapter(tmp_path / "other", "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    fresh.set_adapter("loaded")
    assert torch.equal(case.output(fresh), other)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(case.output(merged), both, rtol=1e-4, atol=1e-5)


def test_half_precision_bases_keep_fp32_copies(mixtral):
    model = get_peft_model(mixtral.base().bfloat16(), mixtral.config()).eval()
    assert {layer.dps_weight["default"].dtype for layer in layers(model).values()} == {torch.float32}
    assert torch.equal(mixtral.output(model), mixtral.output(mixtral.base().bfloat16()))
    mixtral.train(model, steps=3)
    assert model.dps_status().engaged


def test_the_layers_tell_their_names_and_sizes(mixtral):
    model = mixtral.model()
    assert {(layer.parameter_name, layer.in_features, layer.out_features) for layer in layers(model).values()} == {
        ("gate_up_proj", 16, 48),
        ("down_proj", 24, 16),
    }
    assert "parameter_name='down_proj'" in repr(model)
    assert {status.module_type for status in get_layer_status(model)} == {"dps.ParamWrapper"}


class Experts(nn.Module):
    """Two experts, the second half of the inputs for the second."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(2, 5, 3) if transposed else torch.randn(2, 3, 5))

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.mT
        return torch.bmm(x.view(2, -1, 5), weight).flatten(0, 1)


class Net(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_mix_has_noise_on_the_inputs_of_each_expert(transposed):
    plain = Net(transposed).to(DEVICE)
    fields = {"density": 0.6, "stage_steps": 3, "scope": "tensor"}
    config = DPSConfig(target_modules=[], target_parameters=["experts.weight"], variant="mix", seed=5, **fields)
    model = get_peft_model(copy.deepcopy(plain), config)
    noise = ColumnNoise(0.6, seed=5)
    shape = (2, 5, 1) if transposed else (2, 1, 5)
    reference = ReferenceMix(
        [plain.experts.weight],
        draw=lambda step: [noise.draw(step, [10], DEVICE)[0].float().view(shape)],
        decay=False,
        **fields,
    )
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(14):
        x, y = torch.randn(8, 5, device=DEVICE), torch.randint(3, (8,), device=DEVICE)
        ours.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        ours.step()
        theirs.zero_grad()
        output = torch.func.functional_call(plain, {"experts.weight": reference.effective()[0]}, x)
        nn.functional.cross_entropy(output, y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        (layer,) = layers(model).values()
        torch.testing.assert_close(layer.dps_weight["default"], plain.experts.weight, rtol=0, atol=1e-6)
    assert model.dps_status().cycle == 3


def test_mix_of_real_experts(mixtral):
    model = mixtral.model(variant="mix")
    mixtral.train(model, steps=5)
    assert (model.dps_status().cycle, model.dps_status().engaged) == (2, True)


def test_mix_is_refused_where_the_axes_are_unknown():
    case = CASES[1]
    base = case.base()
    with pytest.raises(TargetError, match=r"gate_up_proj' has the shape \(4, 16, 48\), and nothing tells which axis"):
        get_peft_model(base, case.config(variant="mix"))
    assert not layers(base)
    assert set(base.state_dict()) == set(case.base().state_dict())
    case.config(variant="mix", density=1.0)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_module_that_is_read_and_not_called_keeps_its_other_parameters(name):
    attention = nn.MultiheadAttention(8, 2).eval()
    nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(3, 1, 8)
    before = attention(x, x, x)[0]
    model = get_peft_model(
        attention, DPSConfig(stage_steps=2, target_modules=[], target_parameters=[f"out_proj.{name}"])
    ).eval()
    assert torch.equal(model(x, x, x)[0], before)
    wrapper = model.base_model.model.out_proj
    assert (wrapper.weight.shape, wrapper.bias.shape) == ((8, 8), (8,))
    with torch.no_grad():
        wrapper.dps_weight["default"] += 1
    assert not torch.equal(model(x, x, x)[0], before)
    with model.disable_adapter():
        assert torch.equal(model(x, x, x)[0], before)


def test_adapters_with_other_parameters_are_refused(mixtral):
    model = mixtral.model()
    with pytest.raises(ConfigError, match="must be the same in all adapters"):
        model.add_adapter("other", mixtral.config(target_parameters=EXPERTS[:1]))


def test_a_failed_injection_leaves_the_model_as_it_was(mixtral):
    base = mixtral.base()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(TargetError, match="MixtralRMSNorm"):
        get_peft_model(base, mixtral.config(target_modules=["q_proj", "norm"]))
    assert [name for name, _ in base.named_modules()] == before
    second = mixtral.model()
    names = [name for name, _ in second.named_modules()]
    broken = mixtral.config()
    second.base_model.model.model.layers[1].mlp.experts.dps_weight = None  # an injection that breaks off midway
    with pytest.raises(TypeError):
        second.add_adapter("other", broken)
    assert [name for name, _ in second.named_modules() if "layers.0" in name] == [n for n in names if "layers.0" in n]


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_parameters_of_other_tuners_are_refused(mixtral):
    lora = LoraConfig(target_modules=[], target_parameters=EXPERTS[:1], r=1)
    model = get_peft_model(mixtral.base(), lora).base_model.model
    with pytest.raises(TargetError, match=r"already wrapped by another tuner \(peft.tuners.lora"):
        get_peft_model(model, mixtral.config())


def test_experts_that_are_modules_are_refused_with_the_version_that_has_them_in_one_parameter():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})})
    with pytest.raises(TargetError, match=r"'mlp\.experts' is a list of 2 modules.*transformers 5.*`target_modules`"):
        get_peft_model(model, DPSConfig(target_modules=[], target_parameters=EXPERTS))


def test_no_match_is_peft_s_error(mixtral):
    with pytest.raises(ValueError, match=r"not found|No `target_modules`|No modules were targeted"):
        get_peft_model(mixtral.base(), mixtral.config(target_parameters=["experts.nothing"]))


@pytest.mark.parametrize("names", ["experts.down_proj", [1], [""]])
def test_bad_names(names):
    with pytest.raises(ConfigError, match="`target_parameters` must be a list of names"):
        DPSConfig(target_parameters=names)


def test_inject_in_place(mixtral):
    model = inject_adapter_in_model(mixtral.config(init_weights=False), mixtral.base())
    assert len(layers(model)) == 4
    assert not torch.allclose(mixtral.output(model), mixtral.output(mixtral.base()), atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled(mixtral):
    expected, compiled = mixtral.model(), mixtral.model()
    torch._dynamo.reset()
    fast = torch.compile(compiled, backend="eager")
    mixtral.train(expected, steps=4)
    mixtral.train(fast, steps=4)
    torch.testing.assert_close(mixtral.output(fast), mixtral.output(expected), rtol=1e-5, atol=1e-6)
    assert compiled.dps_status().stage is Stage.SUBNETWORK


def test_train_remaining_trains_what_is_no_target(mixtral, caplog):
    model = mixtral.model(train_remaining=True)
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and ".base_layer." not in name and ".original_module." not in name
    ]
    assert frozen == []
    assert len(model.dps_status().layers) == 4
    mixtral.train(model, steps=3)
    partial = mixtral.model(train_remaining=True, target_parameters=EXPERTS[:1])
    assert "cannot reach the parameters of 'model.layers.0.mlp.experts' itself" in caplog.text
    assert len(partial.dps_status().layers) == 2


def test_a_single_number_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    model = nn.ModuleDict({"inner": Scaled()})
    with pytest.raises(TargetError, match=r"The parameter 'inner.scale' is a single number.*Leave it out of"):
        get_peft_model(model, DPSConfig(target_modules=[], target_parameters=["inner.scale"]))
