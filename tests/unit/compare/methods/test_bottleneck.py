from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_dps.compare.methods.bottleneck import Bottleneck, add_houlsby, add_pfeiffer

IDS = torch.randint(2, 15, (4, 8), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 15,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


HEAD = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_bottlenecks_formula():
    hidden, residual = torch.randn(3, 8), torch.randn(3, 8)
    for name, activation in (("gelu", F.gelu), ("relu", F.relu)):
        adapter = Bottleneck(8, 4, name, 1e-3)
        torch.nn.init.normal_(adapter.down.bias)
        down, up = adapter.down, adapter.up
        inner = activation(hidden @ down.weight.T + down.bias) @ up.weight.T + up.bias
        torch.testing.assert_close(adapter(hidden), inner + hidden)
        torch.testing.assert_close(adapter(hidden, residual), inner + residual)


@pytest.mark.parametrize("add", [add_houlsby, add_pfeiffer])
@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (BertForSequenceClassification, BertConfig),
        (RobertaForSequenceClassification, RobertaConfig),
        (ElectraForSequenceClassification, ElectraConfig),
        (DebertaV2ForSequenceClassification, DebertaV2Config),
    ],
)
def test_encoders_like_bert_begin_close_to_the_identity_and_learn(add, model_class, config):
    torch.manual_seed(0)
    model = model_class(config(**SIZES)).eval()
    with torch.no_grad():
        plain = model(IDS).logits
    size = sum(parameter.numel() for parameter in model.parameters())
    assert add(model) is model
    with torch.no_grad():
        # The second layer normalization of Pfeiffer's sees a sum that is normalized already, but for its residual.
        torch.testing.assert_close(model(IDS).logits, plain, atol=1e-3, rtol=1e-3)
    assert sum(parameter.numel() for parameter in model.parameters()) > size
    model(IDS, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_what_houlsby_trains(tiny_bert):
    model = add_houlsby(tiny_bert(), size=4)
    names = trained(model)
    adapters = {name for name in names if ".dropout.1." in name}
    norms = {name for name in names if ".LayerNorm." in name}
    assert len(adapters) == 2 * 2 * 4  # layers, places, tensors
    assert len(norms) == 2 * (1 + 2 * 2)
    assert names - adapters - norms == HEAD
    assert model.bert.encoder.layer[0].attention.output.dropout[1].down.weight.shape == (4, 32)


def test_houlsbys_adapter_comes_before_the_residual_is_added(tiny_bert):
    output = add_houlsby(tiny_bert(), size=4).eval().bert.encoder.layer[0].output
    adapter = output.dropout[1]
    torch.nn.init.normal_(adapter.up.weight)
    hidden, x = torch.randn(3, 64), torch.randn(3, 32)
    torch.testing.assert_close(output(hidden, x), output.LayerNorm(adapter(output.dense(hidden)) + x))


def test_what_pfeiffer_trains(tiny_bert):
    model = add_pfeiffer(tiny_bert())
    names = trained(model)
    adapters = {name for name in names if ".output.adapter." in name}
    assert len(adapters) == 2 * 4
    assert names - adapters == HEAD
    assert model.bert.encoder.layer[0].output.adapter.down.weight.shape == (2, 32)  # a sixteenth


def test_pfeiffers_formula(tiny_bert):
    output = add_pfeiffer(tiny_bert(), size=4).eval().bert.encoder.layer[0].output
    torch.nn.init.normal_(output.adapter.up.weight)
    hidden, x = torch.randn(3, 64), torch.randn(3, 32)
    norm, r = output.output.LayerNorm, output.output.dense(hidden)
    down, up = output.adapter.down, output.adapter.up
    torch.testing.assert_close(output(hidden, x), norm(up(F.relu(down(norm(r + x)))) + r + x))


@pytest.mark.parametrize("add", [add_houlsby, add_pfeiffer])
def test_other_models_and_sizes_are_refused(add, tiny_bert):
    gpt2 = GPT2ForSequenceClassification(GPT2Config(vocab_size=15, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"encoders like BERT .* GPT2ForSequenceClassification has none\. Use"):
        add(gpt2)
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"`size` of .* must be a positive integer, got {size}"):
            add(tiny_bert(), size)
