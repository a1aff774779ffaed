"""Which modules become targets, and which are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from peft_dps import DPSConfig, DPSLayer
from peft_dps.errors import TargetError

CONFIG = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=16,
)  # fmt: skip


def targets(model):
    model = model.base_model.model if hasattr(model, "peft_config") else model
    return {name for name, module in model.named_modules() if isinstance(module, DPSLayer)}


def wrap(module, **options):
    return get_peft_model(module, DPSConfig(**{"stage_steps": 2, **options}))


@pytest.mark.supports("Targets", "`all-linear`")
def test_all_linear_leaves_out_the_heads(bert, gpt2):
    for case, head in ((bert, "classifier"), (gpt2, "lm_head")):
        model = case.model()
        linear = {name for name, module in case.base().named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        assert targets(model) == linear - {head}
        assert targets(wrap(case.base(), task_type=case.options["task_type"])) == linear - {head}


def test_all_linear_is_written_in_any_case(mlp):
    expected = {"head", *(f"body.layers.{i}.{name}" for i in (0, 1) for name in ("fc", "proj"))}
    assert targets(wrap(mlp.base(), target_modules="ALL-LINEAR")) == expected


@pytest.mark.supports("Targets", "`modules_to_save`, heads by `task_type`")
@pytest.mark.parametrize(
    ("model_class", "task_type", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_the_default_config_trains_the_head_in_full(model_class, task_type, head):
    model = wrap(model_class(CONFIG), task_type=task_type)
    assert len(targets(model)) == 6
    assert getattr(model.base_model.model, head).modules_to_save["default"].weight.requires_grad
    model.add_adapter("other", DPSConfig(stage_steps=2, task_type=task_type))
    assert len(targets(model)) == 6
    assert set(getattr(model.base_model.model, head).modules_to_save) == {"default", "other"}


def test_what_peft_takes_for_the_head_is_no_target():
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    base = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
    model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=2))
    inner = model.base_model.model
    assert all(isinstance(head, ModulesToSaveWrapper) for head in (inner.pre_classifier, inner.classifier))
    assert isinstance(inner.distilbert.transformer.layer[0].attention.q_lin, DPSLayer)


@pytest.mark.supports("Targets", "`layers_to_transform`, `layers_pattern`")
@pytest.mark.parametrize("indices", [1, [1]])
@pytest.mark.parametrize("target_modules", [["fc", "proj"], "all-linear"])
def test_layers_to_transform(mlp, target_modules, indices):
    model = wrap(mlp.base(), target_modules=target_modules, layers_to_transform=indices)
    assert targets(model) == {"body.layers.1.fc", "body.layers.1.proj"}


def test_layers_to_transform_of_all_linear_survives_saving(gpt2, tmp_path):
    model = gpt2.model(layers_to_transform=[0], layers_pattern="h")
    expected = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert targets(model) == expected
    model.save_pretrained(tmp_path)
    loaded = DPSConfig.from_pretrained(tmp_path)
    assert targets(get_peft_model(gpt2.base(), loaded)) == expected


@pytest.mark.supports("Targets", "`layers_to_transform`, `layers_pattern`")
def test_layers_pattern_tells_the_lists_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Module()
            self.body.up = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2))
            self.body.down = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2))

    for names in (["fc"], "all-linear"):
        model = wrap(Two(), target_modules=names, layers_to_transform=1, layers_pattern="down")
        assert targets(model) == {"body.down.1.fc"}


@pytest.mark.supports("Targets", "a regular expression")
def test_a_regular_expression(gpt2):
    assert targets(gpt2.model(target_modules=r".*\.h\.1\.mlp\.c_(fc|proj)")) == {
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    }


@pytest.mark.supports("Targets", "`exclude_modules`")
@pytest.mark.parametrize("exclude", [["c_attn", "transformer.h.0.mlp.c_fc"], r".*c_attn|.*0\.mlp\.c_fc"])
def test_exclude_modules(gpt2, exclude):
    assert targets(gpt2.model(exclude_modules=exclude)) == {
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    }


def test_no_match_is_peft_s_error(mlp):
    with pytest.raises(ValueError, match="not found in the base model"):
        wrap(mlp.base(), target_modules=["nothing"])


@pytest.mark.supports("Targets", "`all-linear`")
def test_a_second_all_linear_adapter_finds_the_same_layers(case):
    model = case.model(target_modules="all-linear", modules_to_save=None)
    expected = targets(model)
    assert expected
    model.add_adapter("other", case.config(target_modules="all-linear", modules_to_save=None))
    assert targets(model) == expected
    for module in model.modules():
        if isinstance(module, DPSLayer):
            assert set(module.dps_weight) == {"default", "other"}
    assert not [name for name, _ in model.named_modules() if "base_layer.base_layer" in name]


class Odd(nn.Module):
    """One ordinary layer, and one that a test makes odd."""

    def __init__(self, odd):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.block = nn.Module()
        self.block.odd = odd


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantized(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    return layer


class FourBit(nn.Parameter):
    quant_state = None


def four_bit():
    layer = nn.Linear(4, 4)
    layer.weight = FourBit(torch.zeros(4, 4))
    return layer


REFUSED = {
    "bag": (lambda: nn.EmbeddingBag(4, 4), "is a EmbeddingBag, which DPS cannot train"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 1), "is a ConvTranspose2d, which DPS cannot train"),
    "norm": (lambda: nn.LayerNorm(4), "is a LayerNorm, which DPS cannot train"),
    "attention": (lambda: nn.MultiheadAttention(4, 1), "is a MultiheadAttention, which DPS cannot train"),
    "own forward": (lambda: Scaled(4, 4), "is a Scaled, which DPS cannot train"),
    "int8": (lambda: quantized(torch.int8), r"quantized \(Linear, torch.int8\)"),
    "float8": (lambda: quantized(torch.float8_e4m3fn), r"quantized \(Linear, torch.float8_e4m3fn\)"),
    "four bit": (four_bit, "quantized"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "on the meta device"),
    "empty": (lambda: quantized(torch.float32).to_empty(device="meta"), "empty"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed from other parameters"),
    "weight norm of a conv": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2)),
        "computed from other parameters",
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Embedding(4, 4)),
        "computed from other parameters",
    ),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), "computed from other parameters"),
    "own convolution": (lambda: Standardized(4, 4, 1), "is a Standardized, which DPS cannot train"),
    "lazy": (lambda: nn.LazyConv1d(4, 2), "empty"),
    "conv in meta": (lambda: nn.Conv2d(4, 4, 1, device="meta"), "on the meta device"),
    "embedding in meta": (lambda: nn.Embedding(4, 4, device="meta"), "on the meta device"),
    "conv1d in meta": (lambda: Conv1D(4, 4).to("meta"), "on the meta device"),
}


@pytest.mark.refuses(
    "Targets",
    "modules of other types, subclasses that compute something else, computed weights",
    "a trained copy could not take their place; `exclude_modules` and `modules_to_save` are named as the ways out",
)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_path(kind):
    make, message = REFUSED[kind]
    with pytest.raises(TargetError, match=message) as caught:
        wrap(Odd(make()), target_modules=["fc", "odd"])
    assert "'block.odd'" in str(caught.value)


@pytest.mark.refuses(
    "Targets",
    "targets of another tuner",
    "unload that adapter first",
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_targets_of_other_tuners_are_refused(mlp):
    model = get_peft_model(mlp.base(), LoraConfig(target_modules=["fc"])).base_model.model
    with pytest.raises(
        TargetError, match=r"'body.layers.0.fc' is already wrapped by another tuner \(peft.tuners.lora"
    ):
        wrap(model, target_modules=["fc"])


def test_a_refused_target_leaves_the_model_as_it_was():
    model = Odd(nn.LayerNorm(4))
    before = copy.deepcopy(model)
    with pytest.raises(TargetError, match="LayerNorm"):
        wrap(model, target_modules=["fc", "odd"])
    assert type(model.fc) is nn.Linear
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = wrap(Odd(nn.LayerNorm(4)), target_modules=["fc"])
    with pytest.raises(TargetError, match="LayerNorm"):
        model.add_adapter("other", DPSConfig(stage_steps=2, target_modules=["fc", "odd"]))
    assert set(model.peft_config) == {"default"}
    assert set(model.base_model.model.fc.dps_weight) == {"default"}
    model.add_adapter("other", DPSConfig(stage_steps=2, target_modules=["fc"]))
    assert set(model.base_model.model.fc.dps_weight) == {"default", "other"}


def test_subclasses_that_compute_the_same_are_supported():
    class Named(nn.Linear):
        pass

    model = wrap(Odd(Named(4, 4)), target_modules=["odd"])
    assert targets(model) == {"block.odd"}


def test_another_config_is_refused(mlp):
    model = mlp.model()
    with pytest.raises(ValueError, match="DPS"):
        model.add_adapter("other", LoraConfig(target_modules=["fc"]))
