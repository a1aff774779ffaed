from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import default_collate
from transformers import AutoConfig, AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from peft_dps.compare.methods import table as module
from peft_dps.compare.methods.bitfit import apply_bitfit
from peft_dps.compare.methods.head import head_parameters
from peft_dps.compare.methods.table import FAMILY, METHODS, Method, find_method, register_method
from peft_dps.compare.runs.dps import score_before_training

IDS = torch.randint(15, (4, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


HEAD = ("classifier", "pooler")
_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY = {
    "distilbert": {"vocab_size": 20, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "deberta-v2": {"vocab_size": 20, **_SMALL},
    "roberta": {"vocab_size": 20, **_SMALL},
    "xlnet": {"vocab_size": 20, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "bart": {
        "vocab_size": 20,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "gpt2": {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "modernbert": {"vocab_size": 20, **_SMALL, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
}


def gpt2():
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=15, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    )


@pytest.mark.parametrize(
    "name", [*METHODS, "full-nodropout", "dps-mix-nodropout", "peft:IA3Config", "peft:IA3Config-nodropout"]
)
def test_every_method_trains_what_it_says_and_the_head(name, tiny_bert):
    options = {"target_modules": ["key"], "feedforward_modules": []} if "IA3" in name else {}
    options = {"stage_steps": 2} if name.startswith(("dps", "random")) else options
    base = tiny_bert()
    model, config = find_method(name).apply(base, options)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(input_ids=IDS, labels=LABELS).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved <= set(trained(model))
    for part in HEAD if not name.startswith("peft:") else HEAD[:1]:
        assert sum(part in each for each in moved) == 2, part
    json.dumps(config)


@pytest.mark.parametrize("name", FAMILY)
def test_every_recipe_is_a_method_that_trains_the_head_and_what_it_selects(name, tiny_bert):
    units = {"units": 2} if "units" in find_method(name).apply(tiny_bert(), {})[1] else {}
    steps = {"score_steps": 2} if name == "recipe:smt" else {}
    model, config = find_method(name).apply(tiny_bert(), {"total_steps": 20, **units, **steps}, seed=3)
    examples = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS, strict=True)]
    score_before_training(model, examples, default_collate)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(12):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if p.shape != before[n].shape or not torch.equal(p, before[n])}
    assert any("dps_" in each for each in moved)
    for part in HEAD:
        assert sum(part in each for each in moved) == 2, part
    assert config["seed"] == 3
    json.dumps(config)


@pytest.mark.parametrize("name", ["dps-dense", "dps-mix", "random-mask"])
def test_dps_trains_as_many_entries_as_full_fine_tuning(name, tiny_bert):
    full, _ = find_method("full").apply(tiny_bert(), {})
    model, config = find_method(name).apply(tiny_bert(), {"density": 0.25})
    assert sum(p.numel() for p in trained(model).values()) == sum(p.numel() for p in trained(full).values())
    assert config["density"] == 0.25
    assert (config["variant"], config["score"]) == {
        "dps-dense": ("dense", "squared_gradient"),
        "dps-mix": ("mix", "squared_gradient"),
        "random-mask": ("dense", "random"),
    }[name]


@pytest.mark.parametrize("name", ["lora", "dps-dense", "peft:LoraConfig"])
def test_options_stay_as_they_were_given(name, tiny_bert):
    options = {"target_modules": ["query"], "modules_to_save": ["embeddings"]}
    model, _ = find_method(name).apply(tiny_bert(), options)
    assert options == {"target_modules": ["query"], "modules_to_save": ["embeddings"]}  # else it is another run
    for part in ("word_embeddings", "classifier"):
        assert any(part in parameter for parameter in trained(model))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT finds out by itself
@pytest.mark.parametrize("model_type", ["distilbert", "deberta-v2", "roberta", "xlnet", "bart", "gpt2", "modernbert"])
def test_lora_trains_the_head_of_every_model_in_full(model_type):
    config = AutoConfig.for_model(model_type, **TINY.get(model_type, {}))
    base = AutoModelForSequenceClassification.from_config(config)
    entries = sum(base.get_parameter(name).numel() for name in head_parameters(base))
    model, _ = find_method("lora").apply(base, {})
    low_rank = {name: p for name, p in trained(model).items() if "lora_" in name}
    assert sum(p.numel() for p in trained(model).values()) == entries + sum(p.numel() for p in low_rank.values())
    assert low_rank


@pytest.mark.parametrize("name", ["dps-dense", "dps-mix", "random-mask"])
@pytest.mark.parametrize("model_type", ["distilbert", "deberta-v2", "roberta", "bart", "gpt2", "modernbert"])
def test_dps_trains_everything_in_every_model(name, model_type):
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **TINY.get(model_type, {})))
    entries = sum(parameter.numel() for parameter in base.parameters())
    model, _ = find_method(name).apply(base, {"stage_steps": 2})
    assert sum(parameter.numel() for parameter in trained(model).values()) == entries


def test_options_that_are_no_json_are_kept_as_text(tiny_bert):
    def prepare(model, layers=None):
        return model

    method = Method("mine", "mine", prepare, defaults={"layers": {2, 1}})
    _, config = method.apply(tiny_bert(), {})
    assert json.loads(json.dumps(config)) == {"dropout": True, "layers": ["1", "2"]}


@pytest.mark.parametrize("name", ["dps-mix", "random-mask"])
def test_what_dps_draws_follows_the_seed_unless_the_options_have_one(name, tiny_bert):
    assert find_method(name).apply(tiny_bert(), {}, seed=3)[1]["seed"] == 3
    assert find_method(name).apply(tiny_bert(), {"seed": 5}, seed=3)[1]["seed"] == 5


@pytest.mark.parametrize("name", ["full", "dps-dense", "lora", "houlsby"])
def test_dropout_is_the_models_or_none(name, tiny_bert):
    def rates(model):
        return {
            module.p for path, module in model.named_modules() if isinstance(module, nn.Dropout) and "lora" not in path
        }

    kept, kept_config = find_method(name).apply(tiny_bert(), {})
    gone, gone_config = find_method(f"{name}-nodropout").apply(tiny_bert(), {})
    also, _ = find_method(name).apply(tiny_bert(), {"dropout": False})
    assert rates(kept) == {0.1}
    assert rates(gone) == rates(also) == {0.0}
    assert (kept_config["dropout"], gone_config["dropout"]) == (True, False)
    assert find_method(f"{name}-nodropout").title.endswith(", no dropout")


def test_bitfit_trains_every_bias_and_the_head(tiny_bert):
    model = apply_bitfit(tiny_bert())
    assert set(trained(model)) == {
        name
        for name, _ in model.named_parameters()
        if name.endswith(".bias") or name.startswith(("classifier.", "bert.pooler."))
    }
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in trained(model)


def test_bitfit_needs_biases(tiny_bert):
    model = tiny_bert()
    for part in list(model.bert.modules()):
        if getattr(part, "bias", None) is not None:
            part.bias = None
    with pytest.raises(ValueError, match="BitFit needs a model with bias terms, and BertForSequenceClassification"):
        apply_bitfit(model)


def test_the_head_is_what_is_outside_the_pretrained_part_and_its_pooler(tiny_bert):
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert head_parameters(tiny_bert()) == {"classifier.weight", "classifier.bias", *pooler}
    assert head_parameters(gpt2()) == {"score.weight"}
    with pytest.raises(ValueError, match="GPT2Model has no head"):
        head_parameters(gpt2().transformer)


def test_any_config_of_peft_by_class_name(tiny_bert):
    method = find_method("peft:LoraConfig")
    method.check({"r": 2})
    model, config = method.apply(tiny_bert(), {"r": 2, "target_modules": "all-linear"})
    assert (method.title, config["r"], config["task_type"]) == ("Lora", 2, "SEQ_CLS")
    assert any("lora_A" in name and parameter.shape[0] == 2 for name, parameter in trained(model).items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lorra", "`methods` must be among full, lora, .* got 'lorra'"),
        ("lorra-nodropout", "got 'lorra-nodropout'"),
        ("peft:LoraModel", "PEFT has no configuration class 'LoraModel'"),
        ("peft:Nothing", "PEFT has no configuration class 'Nothing'"),
        ("recipe:nothing", "'recipe:nothing' must be recipe: and one of badam, "),
    ],
)
def test_unknown_methods_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        find_method(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"density": 0.5}, r"options of method 'full' do not work, got \{'density': 0.5\}.*'density'"),
        ("lora", {"rank": 8}, "'rank'"),
        ("peft:LoraConfig", {"rank": 8}, "'rank'"),
        ("dps-dense", {"density": 2}, r"`density` must be in \(0, 1\], got 2"),
        ("dps-dense", {"dropout": 0.3}, "`dropout` of method 'dps-dense' must be true or false, got 0.3"),
        ("houlsby", {"width": 3}, "'width'"),
    ],
)
def test_options_that_do_not_work_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_method(name).check(options)


def test_a_user_adds_a_method_in_a_few_lines(monkeypatch, tiny_bert):
    monkeypatch.setattr(module, "METHODS", dict(METHODS))

    @register_method("rslora", "rank-stabilized LoRA", learning_rates=(1e-4, 3e-4))
    def rslora(model, r=8):
        return LoraConfig(r=r, use_rslora=True, target_modules="all-linear", task_type="SEQ_CLS")

    method = find_method("rslora")
    assert method.learning_rates == (1e-4, 3e-4)
    method.check({"r": 2})
    _, config = method.apply(tiny_bert(), {"r": 2})
    assert (config["r"], config["use_rslora"]) == (2, True)
