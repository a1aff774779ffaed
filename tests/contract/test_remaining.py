"""`train_remaining=True`: everything that is no target is trained in full."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForSequenceClassification

from peft_dps import DPSConfig, DPSLayer
from peft_dps.errors import TargetError
from tests.device import DEVICE

pytestmark = pytest.mark.device


def frozen_in_effect(model):
    """Names of parameters that the active adapter computes with, and that are not trained."""
    shadowed = ("base_layer.", "original_module.")
    return [n for n, p in model.named_parameters() if not p.requires_grad and not any(part in n for part in shadowed)]


def trained_modules(model, adapter="default"):
    mark = f".modules_to_save.{adapter}"
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if mark in n and p.requires_grad]
    return {name.split(mark)[0].removeprefix("base_model.model.") for name in names}


@pytest.mark.supports("Targets", "`train_remaining`: everything else in full")
def test_everything_is_trained(case, snapshot):
    model = case.model(train_remaining=True, modules_to_save=None)
    assert frozen_in_effect(model) == []
    base = case.base()
    before = snapshot(model)
    case.train(model, steps=4)
    after = snapshot(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= moved
    assert all(torch.equal(before[name], after[name]) for name in before if "base_layer" in name)
    with model.disable_adapter():
        assert torch.equal(case.output(model), case.output(base))


def test_everything_is_saved_loaded_and_merged(case, tmp_path):
    model = case.model(train_remaining=True)
    case.train(model, steps=3)
    expected = case.output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    torch.testing.assert_close(case.output(loaded), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(case.output(merged), expected, rtol=1e-5, atol=1e-6)
    assert set(merged.state_dict()) == set(case.base().state_dict())


def test_only_targets_are_wrapped(mlp):
    model = mlp.model(train_remaining=True, modules_to_save=None)
    assert trained_modules(model) == {"norm", "head"}
    assert len([m for m in model.modules() if isinstance(m, DPSLayer)]) == 4


def test_linear_layers_that_are_no_targets_are_trained_too(gpt2):
    model = gpt2.model(train_remaining=True, layers_to_transform=[0])
    assert frozen_in_effect(model) == []
    assert {"transformer.h.1.mlp.c_fc", "transformer.h.1.ln_1", "transformer.wte", "lm_head"} <= trained_modules(model)
    assert "transformer.h.0.mlp.c_fc" not in trained_modules(model)


def test_tied_embeddings_stay_tied(gpt2, tmp_path):
    model = gpt2.model(train_remaining=True)
    case_model = model.base_model.model
    assert case_model.lm_head.weight is case_model.transformer.wte.weight
    gpt2.train(model, steps=3)
    assert torch.equal(case_model.lm_head.weight, case_model.transformer.wte.weight)
    assert not torch.equal(case_model.lm_head.weight, gpt2.base().lm_head.weight)
    expected = gpt2.output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2.base(), tmp_path, is_trainable=True).eval()
    inner = loaded.base_model.model
    assert inner.lm_head.weight is inner.transformer.wte.weight
    torch.testing.assert_close(gpt2.output(loaded), expected)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    torch.testing.assert_close(gpt2.output(merged), expected)


@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter", "into the adapter that is there"])
def test_tied_embeddings_are_tied_after_every_way_of_loading(gpt2, tmp_path, load):
    model = gpt2.model(train_remaining=True)
    gpt2.train(model, steps=1)
    model.save_pretrained(tmp_path / "first")
    options = {"low_cpu_mem_usage": True, "is_trainable": True}
    if load == "from_pretrained":
        loaded = PeftModel.from_pretrained(gpt2.base(), tmp_path / "first", **options)
    else:
        loaded = gpt2.model(train_remaining=True)
        name = "other" if load == "load_adapter" else "default"
        loaded.load_adapter(tmp_path / "first", name, **options)
        loaded.set_adapter(name)
    gpt2.train(loaded, steps=3)
    inner = loaded.base_model.model
    assert inner.lm_head.weight is inner.transformer.wte.weight
    expected = gpt2.output(loaded)
    loaded.save_pretrained(tmp_path / "again", selected_adapters=[loaded.active_adapter])
    folder = tmp_path / "again" / ("other" if load == "load_adapter" else "")
    again = PeftModel.from_pretrained(gpt2.base(), folder).eval()
    torch.testing.assert_close(gpt2.output(again), expected)


def test_tied_heads_keep_their_bias():
    base = BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=24, max_position_embeddings=16)).eval()  # fmt: skip
    torch.nn.init.normal_(base.cls.predictions.decoder.bias)
    tokens = torch.arange(6, device=DEVICE).view(1, 6)
    expected = base(tokens).logits
    model = get_peft_model(base, DPSConfig(stage_steps=2, train_remaining=True)).eval()
    torch.testing.assert_close(model(tokens).logits, expected)
    decoder = model.base_model.model.cls.predictions.decoder
    assert decoder.bias.requires_grad
    assert decoder.weight is model.base_model.model.bert.embeddings.word_embeddings.weight


def test_untied_heads_are_trained(untied_gpt2, snapshot):
    model = untied_gpt2.model(train_remaining=True)
    head = model.base_model.model.lm_head
    before = head.weight.detach().clone()
    untied_gpt2.train(model, steps=2)
    assert not torch.equal(head.weight, before)
    assert head.weight is not model.base_model.model.transformer.wte.weight


def test_heads_of_several_layers_are_saved_whole():
    config = RobertaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=24, max_position_embeddings=16)  # fmt: skip
    model = get_peft_model(
        RobertaForSequenceClassification(config), DPSConfig(stage_steps=2, task_type="SEQ_CLS", train_remaining=True)
    )
    assert frozen_in_effect(model) == []
    assert "classifier" in trained_modules(model)
    assert not [name for name, _ in model.named_modules() if name.count("modules_to_save.default") > 1]


def test_a_second_adapter_trains_the_same_modules(case):
    model = case.model(train_remaining=True)
    model.add_adapter("other", case.config(train_remaining=True, init_weights=False))
    first, modules = case.output(model), trained_modules(model)
    model.set_adapter("other")
    assert all(".default" in name for name in frozen_in_effect(model))
    assert trained_modules(model, "other") == modules
    assert not torch.allclose(case.output(model), first)
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)


def test_the_saved_file_names_nothing_but_the_adapter(gpt2, tmp_path):
    model = gpt2.model(train_remaining=True)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    plain = {name.removesuffix(".weight").removesuffix(".bias") for name in gpt2.base().state_dict()}
    for key in keys:
        module = key.removeprefix("base_model.model.").rpartition(".")[0]
        assert module in plain, key


class Bare(nn.Module):
    """A parameter of its own beside a target."""

    def __init__(self):
        super().__init__()
        self.block = nn.Module()
        self.block.scale = nn.Parameter(torch.ones(4))
        self.block.fc = nn.Linear(4, 4)
        self.free = nn.Module()
        self.free.shift = nn.Parameter(torch.zeros(4))
        self.free.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.free.norm(self.block.fc(x) * self.block.scale + self.free.shift)


def test_what_cannot_be_reached_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="peft_dps"):
        model = get_peft_model(Bare(), DPSConfig(stage_steps=2, train_remaining=True, target_modules=["fc"]))
    assert frozen_in_effect(model) == ["base_model.model.block.scale"]
    assert "the parameters of 'block' itself" in caplog.text
    assert trained_modules(model) == {"free"}


class Clash(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})])
        self.fc = nn.Linear(4, 4)


def test_names_that_peft_cannot_tell_apart_are_refused():
    base = Clash()
    with pytest.raises(TargetError, match=r"'fc' in full.*from the target 'layers.0.fc'"):
        get_peft_model(base, DPSConfig(stage_steps=2, train_remaining=True, target_modules=["layers.0.fc"]))
    assert not [module for module in base.modules() if isinstance(module, DPSLayer)]
