from __future__ import annotations

import pytest
import torch

from peft_dps.compare.methods.head import head_parameters
from peft_dps.compare.methods.table import find_method
from peft_dps.compare.methods.wise_ft import average


def test_weights_are_averaged_and_the_head_stays(tiny_bert):
    pretrained, model = tiny_bert(seed=0), tiny_bert(seed=1)
    trained = {name: tensor.clone() for name, tensor in model.named_parameters()}
    average(model, pretrained, 0.25)
    head, start = head_parameters(model), dict(pretrained.named_parameters())
    assert head
    for name, tensor in model.named_parameters():
        expected = trained[name] if name in head else 0.75 * start[name] + 0.25 * trained[name]
        torch.testing.assert_close(tensor, expected, msg=name)


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_ends_are_the_two_models_to_the_bit(alpha, tiny_bert):
    pretrained, model = tiny_bert(seed=0), tiny_bert(seed=1)
    expected = {name: tensor.clone() for name, tensor in (model if alpha else pretrained).bert.named_parameters()}
    average(model, pretrained, alpha)
    head = {name.removeprefix("bert.") for name in head_parameters(model)}
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in model.bert.named_parameters() if name not in head
    )


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "half", True])
def test_a_share_that_is_none_is_refused(alpha):
    with pytest.raises(ValueError, match=r"`alpha` of wise-ft must be a number in \[0, 1\]"):
        find_method("wise-ft").check({"alpha": alpha})


def test_only_a_method_with_an_end_changes_the_model(tiny_bert):
    model = tiny_bert(seed=1)
    assert not find_method("full").end(model, tiny_bert, {})
    before = model.bert.embeddings.word_embeddings.weight.clone()
    assert find_method("wise-ft-nodropout").end(model, tiny_bert, {"alpha": 0.9, "dropout": False})
    assert not torch.equal(before, model.bert.embeddings.word_embeddings.weight)
