"""What is ranked together."""

from __future__ import annotations

import pytest

from peft_dps.selection.scope import SCOPES


def test_weights_are_ranked_each_by_itself_or_all_together():
    tensor, model = SCOPES.find("tensor")(), SCOPES.find("model")()
    names = ["a", "b", "c"]
    assert tensor.problems(names) == [[0], [1], [2]]
    assert model.problems(names) == [[0, 1, 2]]
    assert tensor.problems([]) == model.problems([]) == SCOPES.find("category")().problems([]) == []


@pytest.mark.parametrize(
    ("attention", "others"),
    [
        (["model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp.up_proj"]),
        (["bert.encoder.layer.{}.attention.output.dense"], ["bert.encoder.layer.{}.output.dense"]),
        (["encoder.block.{}.layer.0.SelfAttention.q"], ["encoder.block.{}.layer.1.DenseReluDense.wi"]),
        (["h.{}.attn.c_attn"], ["h.{}.mlp.c_fc", "h.{}.mlp.c_proj"]),
    ],
    ids=["llama", "bert", "t5", "gpt2"],
)
def test_attention_and_the_others_of_each_layer_are_ranked_apart(attention, others):
    names, expected = [], []
    for layer in range(2):
        for part in (attention, others):
            expected.append([len(names) + index for index in range(len(part))])
            names += [path.format(layer) for path in part]
    assert SCOPES.find("category")().problems(names) == expected


def test_weights_outside_of_the_layers_are_a_category_by_themselves():
    names = ["embed_attention", "layers.0.attn.q", "layers.0.fc", "head.attn", "layers.0.attn.k"]
    assert SCOPES.find("category")().problems(names) == [[0, 3], [1, 4], [2]]
