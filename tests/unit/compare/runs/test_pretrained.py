from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from peft_dps.compare.data.task import build_task
from peft_dps.compare.runs.pretrained import check_model, load_model, load_tokenizer, longest_input
from peft_dps.compare.settings import Settings

SETTINGS = Settings(validation_size=8)


def test_a_head_of_another_size_gives_way_to_a_new_one_drawn_by_the_seed(examples, model_folder):
    numbers = examples(regression=True)
    task = build_task("numbers", numbers, {"here": numbers}, SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    heads = [load_model(task, str(model_folder), seed, tokenizer).classifier.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (1, 32)
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_models_that_cannot_get_a_head_are_named(model_folder, tmp_path):
    check_model(str(model_folder))
    assert longest_input(str(model_folder), 64) == 16
    assert longest_input(str(model_folder), 8) == 8
    with pytest.raises(OSError, match=r"`model` '.*nowhere' cannot be loaded"):
        check_model(str(tmp_path / "nowhere"))
    config = (model_folder / "config.json").read_text()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(config)
    with pytest.raises(OSError, match=r"The tokenizer of `model` '.*bare' cannot be loaded"):
        check_model(str(tmp_path / "bare"))
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"`model` must be one .* a classification head, got '.*vision'.*'vit'"):
        check_model(str(vision))


UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def save_tokenizer(folder, **fields):
    words = {word: index for index, word in enumerate([UNKNOWN, BEGIN, END, "a", "good", "film"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, **fields).save_pretrained(folder)


@pytest.fixture
def decoder(tmp_path):
    """A decoder whose configuration has another padding token than its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(vocab_size=6, pad_token_id=0, max_position_embeddings=16, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_padding_changes_nothing_that_a_decoder_says(decoder, examples):
    save_tokenizer(decoder, eos_token=END)
    task = build_task("mine", examples(), {"here": examples(18)}, SETTINGS)
    tokenizer = load_tokenizer(str(decoder))
    model = load_model(task, str(decoder), 0, tokenizer).eval()
    texts = ["good film", "a a a good film"]
    with torch.no_grad():
        alone = model(**tokenizer(texts[:1], return_tensors="pt")).logits
        padded = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(padded[:1], alone)


def test_a_tokenizer_that_cannot_pad_is_named(decoder):
    save_tokenizer(decoder)
    with pytest.raises(ValueError, match=r"The tokenizer of `model` '.*' has no token to pad batches with"):
        check_model(str(decoder))


def test_positions_that_are_none_of_a_text_are_not_counted(tmp_path):
    save_tokenizer(tmp_path, pad_token=BEGIN)
    RobertaConfig(max_position_embeddings=34, pad_token_id=1).save_pretrained(tmp_path)
    assert longest_input(str(tmp_path), 128) == 32


def test_a_tokenizer_may_take_less_than_its_model(tmp_path):
    save_tokenizer(tmp_path, pad_token=BEGIN, model_max_length=12)
    LlamaConfig(max_position_embeddings=64).save_pretrained(tmp_path)
    assert longest_input(str(tmp_path), 128) == 12
