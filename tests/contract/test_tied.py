"""Weights that several modules share: trained as a copy, merged without touching the others, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2LMHeadModel

from peft_dps import DPSConfig, DPSLayer
from peft_dps.errors import TargetError
from tests.device import DEVICE

HEAD, WORDS = "lm_head", "transformer.wte"
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]


def wrap(case, **options):
    return case.model(**{"init_weights": False, **options})


def inner(model):
    return model.base_model.model if isinstance(model, PeftModel) else model


@pytest.mark.supports("Targets", "one of two tied weights, as a copy of its own")
def test_the_head_is_trained_as_a_copy_of_its_own(gpt2):
    model = wrap(gpt2, target_modules=[HEAD])
    embedding = inner(model).transformer.wte.weight
    before = embedding.detach().clone()
    gpt2.train(model, steps=5)
    assert torch.equal(embedding, before)
    assert embedding is inner(model).lm_head.base_layer.weight
    assert not torch.equal(inner(model).lm_head.weight, before)
    with model.disable_adapter():
        assert torch.equal(gpt2.output(model), gpt2.output(gpt2.base()))


@pytest.mark.supports("Merging", "tied weights: merging unties, unmerging ties again")
@pytest.mark.parametrize(("target", "other"), [(HEAD, WORDS), (WORDS, HEAD)])
def test_merging_leaves_the_other_alone_and_unmerging_ties_again(gpt2, target, other, caplog):
    model = wrap(gpt2, target_modules=[target])
    assert f"the target '{target}' is shared with '{other}', which is no target" in caplog.text
    bystander = inner(model).get_submodule(other)
    pretrained = bystander.weight.detach().clone()
    expected = gpt2.output(model)
    model.merge_adapter()
    torch.testing.assert_close(gpt2.output(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(bystander.weight, pretrained)
    model.unmerge_adapter()
    assert inner(model).get_submodule(target).base_layer.weight is bystander.weight
    assert torch.equal(bystander.weight, pretrained)


@pytest.mark.parametrize("move", [lambda m: m.double(), copy.deepcopy], ids=["cast", "copied"])
def test_a_merged_model_ties_again_after_it_was(gpt2, move):
    model = wrap(gpt2, target_modules=[HEAD])
    model.merge_adapter()
    model = move(model)
    model.unmerge_adapter()
    assert inner(model).lm_head.base_layer.weight is inner(model).transformer.wte.weight


@pytest.mark.parametrize("target", [HEAD, WORDS])
def test_merge_and_unload_unties_and_says_so(gpt2, target, tmp_path):
    model = wrap(gpt2, target_modules=[target])
    expected = gpt2.output(model)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(gpt2.output(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval().to(DEVICE)
    torch.testing.assert_close(gpt2.output(loaded), expected, rtol=1e-5, atol=1e-5)


def test_unload_keeps_the_tie(gpt2):
    unloaded = wrap(gpt2, target_modules=[HEAD]).unload()
    assert unloaded.lm_head.weight is unloaded.transformer.wte.weight
    assert torch.equal(unloaded.lm_head.weight, gpt2.base().lm_head.weight)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_of_a_tied_head_comes_back(gpt2, tmp_path):
    model = wrap(gpt2, target_modules=[HEAD, "c_fc"])
    gpt2.train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2.base(), tmp_path).eval()
    assert torch.equal(gpt2.output(loaded), gpt2.output(model))
    assert inner(loaded).lm_head.base_layer.weight is inner(loaded).transformer.wte.weight


@pytest.mark.refuses(
    "Targets",
    "both of two tied weights in one adapter",
    "they would be trained apart; leave one out, or both to `train_remaining`",
)
def test_two_targets_with_one_weight_are_refused(gpt2):
    base = gpt2.base()
    with pytest.raises(TargetError, match=r"'transformer.wte' and 'lm_head' share one weight.*train_remaining"):
        get_peft_model(base, gpt2.config(target_modules=["wte", HEAD]))
    assert not [module for module in base.modules() if isinstance(module, DPSLayer)]
    assert base.lm_head.weight is base.transformer.wte.weight


def test_a_refusal_of_tied_targets_leaves_all_of_the_model_trainable(gpt2):
    model = gpt2.base()
    frozen = model.transformer.ln_f.weight.requires_grad_(False)
    with pytest.raises(TargetError):
        get_peft_model(model, gpt2.config(target_modules=[HEAD, WORDS]))
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]


def test_untied_models_take_both(untied_gpt2):
    model = wrap(untied_gpt2, target_modules=["wte", HEAD])
    untied_gpt2.train(model, steps=3)
    assert set(model.dps_status().layers) == {WORDS, HEAD}


@pytest.mark.supports("Targets", "one of two tied weights, as a copy of its own")
def test_adapters_of_their_own_may_take_one_each(gpt2):
    model = wrap(gpt2, target_modules=[HEAD])
    model.add_adapter("other", gpt2.config(target_modules=["wte"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = gpt2.output(model)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(gpt2.output(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert inner(model).lm_head.base_layer.weight is inner(model).transformer.wte.base_layer.weight


def test_embeddings_tied_over_encoder_and_decoder():
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=20,
    )  # fmt: skip
    with pytest.raises(TargetError, match=r"'model.encoder.embed_tokens' and 'model.decoder.embed_tokens' share"):
        get_peft_model(BartForConditionalGeneration(config), DPSConfig(stage_steps=2, target_modules=["embed_tokens"]))


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_with_two_names_is_refused():
    base = Twice()
    with pytest.raises(TargetError, match=r"'first' is the same module as 'second'"):
        get_peft_model(base, DPSConfig(stage_steps=2, target_modules=["first"]))
    assert base.first is base.second
    assert type(base.first) is nn.Linear
