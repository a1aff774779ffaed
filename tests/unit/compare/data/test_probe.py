"""Probes on tiny models: what they measure, and of which models and data they cannot."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from peft_dps.compare.data.examples import DataError, Examples
from peft_dps.compare.data.probe import Probe, embed
from peft_dps.compare.runs.pretrained import load_tokenizer

TEXTS = ("the good film", "a bad plot", "a great fine film", "awful", "the poor plot", "good", "fine", "a a a")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def rated(texts, ratings, name="mine"):
    pairs = (*texts[1:], texts[0])
    return Probe(name, Examples(name, tuple(texts), tuple(ratings), tuple(texts), (), pairs))


def passages(texts, name="plain"):
    return Probe(name, Examples(name, tuple(texts), (0.0,) * len(texts), tuple(texts)))


@pytest.fixture
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


def test_an_embedding_is_the_mean_over_a_texts_own_tokens(tiny_bert, tokenizer):
    backbone = tiny_bert().eval().bert
    with torch.no_grad():
        alone = [backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in TEXTS]
    expected = F.normalize(torch.stack(alone), dim=1)
    torch.testing.assert_close(embed(backbone, tokenizer, TEXTS, 16), expected, atol=1e-6, rtol=1e-5)


def test_rated_pairs_are_correlated_with_the_cosine(tiny_bert, tokenizer):
    backbone, ratings = tiny_bert().eval().bert, [float(i * i % 7) for i in range(len(TEXTS))]
    embedded = embed(backbone, tokenizer, TEXTS, 16)
    cosine = F.cosine_similarity(embedded, embedded.roll(-1, 0))
    probe = rated(TEXTS, ratings)
    assert probe.metric == "spearman"
    assert probe.measure(backbone, tokenizer, "", 16) == pytest.approx(spearmanr(cosine, ratings)[0])


def test_pairs_of_two_ratings_are_counted(tiny_bert, tokenizer):
    backbone = tiny_bert().eval().bert
    probe = rated(TEXTS, [5.0, 1.0] * 4)
    embedded = embed(backbone, tokenizer, TEXTS, 16)
    cosine = F.cosine_similarity(embedded, embedded.roll(-1, 0))
    pairs = [(float(high), float(low)) for high in cosine[0::2] for low in cosine[1::2]]
    assert probe.metric == "AUC"
    share = sum(high > low for high, low in pairs) / len(pairs)
    assert probe.measure(backbone, tokenizer, "", 16) == pytest.approx(share)


def test_a_broken_model_scores_what_chance_does(tiny_bert, tokenizer):
    backbone = tiny_bert().eval().bert
    with torch.no_grad():
        backbone.embeddings.word_embeddings.weight.fill_(math.nan)
    assert rated(TEXTS, range(8)).measure(backbone, tokenizer, "", 16) == 0
    assert rated(TEXTS, [0.0, 1.0] * 4).measure(backbone, tokenizer, "", 16) == 0.5


def test_what_is_trained_on_is_left_out():
    texts = [f"text {i}" for i in range(14)]
    probe = rated(texts, map(float, range(14)))
    left = probe.without({"text 3", "elsewhere"})  # the second text of a pair, and the first of the next
    assert left.examples.texts == (*texts[:2], *texts[4:])
    assert left.fingerprint() != probe.fingerprint() == probe.without({"elsewhere"}).fingerprint()
    with pytest.raises(DataError, match=r"'mine' must have 10 passages, or as many pairs .*, got 0 of 14"):
        probe.without(texts)
    with pytest.raises(DataError, match=r"'mine' must have .* different ratings"):
        rated(texts, [1.0] * 14).without({})
    assert passages(texts).without({"text 0", "text 13"}).examples.texts == tuple(texts[1:13])
    with pytest.raises(DataError, match=r"'plain' must have 10 passages.*, got 8 of 14"):
        passages(texts).without(texts[:6])


@pytest.fixture
def with_head(model_folder):
    """Save a language model beside the tokenizer; returns the folder and the model."""

    def make(kind):
        torch.manual_seed(1)
        encoder = BertConfig(vocab_size=15, max_position_embeddings=16, **SMALL)
        decoder = GPT2Config(
            vocab_size=15, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3
        )
        model = BertForMaskedLM(encoder) if kind == "encoder" else GPT2LMHeadModel(decoder)
        model.save_pretrained(model_folder)
        return str(model_folder), model.eval()

    return make


def test_the_loss_of_a_decoder(with_head, tokenizer):
    folder, model = with_head("decoder")
    probe = passages(TEXTS)
    probe.check(folder)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        before = logits[: ids.shape[1]]  # each of the words: the special tokens are not asked for
        total += float(F.cross_entropy(before, ids[0], reduction="sum"))
        count += ids.shape[1]
    assert probe.measure(model.transformer, tokenizer, folder, 16) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_of_an_encoder_is_of_masked_tokens_always_the_same(with_head, tokenizer, tiny_bert):
    folder, model = with_head("encoder")
    probe = passages(20 * TEXTS)
    seen = []
    model.bert.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses = [probe.measure(model.bert, tokenizer, folder, 16) for _ in range(2)]
    masked = [int((ids == tokenizer.mask_token_id).sum()) for ids in seen]
    words = sum(len(text.split()) for text in probe.examples.texts)
    assert losses[0] == losses[1] == pytest.approx(math.log(15), abs=0.3)  # it has learned nothing
    assert masked[: len(masked) // 2] == masked[len(masked) // 2 :]
    assert sum(masked) / 2 == pytest.approx(0.15 * words, rel=0.25)
    other = tiny_bert(seed=5).eval().bert
    assert probe.measure(other, tokenizer, folder, 16) != losses[0]


def test_a_model_without_its_head_has_no_loss(model_folder):
    with pytest.raises(ValueError, match=r"with the head that it was pretrained with, got .* saved without \(cls\."):
        passages(TEXTS).check(str(model_folder))


def test_an_encoder_and_decoder_has_no_loss(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(ValueError, match=r"of an encoder or of a decoder, got .* of type 'bart'"):
        passages(TEXTS).check(str(tmp_path))
