from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from peft_dps import disable_dropout

TINY = {"vocab_size": 30, "num_labels": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **TINY)
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, **TINY)),
    "bart": lambda: BartForSequenceClassification(
        BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            attention_dropout=0.1,
            activation_dropout=0.1,
            classifier_dropout=0.1,
            **TINY,
        )
    ),
    "llama": lambda: LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            attention_dropout=0.3,
            **TINY,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_forwards_become_deterministic(name, caplog):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]])
    random = [model(input_ids=ids).logits for _ in range(4)]
    assert any(not torch.equal(random[0], other) for other in random[1:])
    with caplog.at_level(logging.INFO):
        changed = disable_dropout(model)
    assert changed
    assert f"Dropout set to 0 in {len(changed)} places" in caplog.text
    fixed = [model(input_ids=ids).logits for _ in range(4)]
    assert all(torch.equal(fixed[0], other) for other in fixed[1:])
    assert disable_dropout(model) == {}


@dataclass(frozen=True)
class Frozen:
    attn_pdrop: float = 0.1


class Slotted:
    __slots__ = ()


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"dropout": 0.1, "width": 4.0, 3: 0.5}, lambda config: config["dropout"]),
        (Frozen(), lambda config: config.attn_pdrop),
        (Slotted(), lambda config: 0.0),
    ],
    ids=["dict", "frozen", "slots"],
)
def test_configs_of_any_kind(config, read):
    model = nn.Linear(2, 2)
    model.config = config
    changed = disable_dropout(model)
    assert list(changed.values()) == [0.1] * (not isinstance(config, Slotted))
    assert read(config) == 0.0
    assert not isinstance(config, dict) or (config["width"], config[3]) == (4.0, 0.5)


def test_what_is_no_dropout_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(0.25))
    model.temperature = 0.5
    assert disable_dropout(model) == {"2": 0.25}
    assert model.temperature == 0.5
    assert model[1].eps == 1e-5
