from __future__ import annotations

import pytest
import torch
from datasets import disable_progress_bars, enable_progress_bars
from transformers import BertConfig, BertForSequenceClassification

from peft_dps.compare.data.examples import Examples
from tests.local_models import write_tokenizer

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDS = ["good", "fine", "great", "bad", "poor", "awful", "a", "the", "film", "plot"]


@pytest.fixture(autouse=True)
def _quiet():
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture
def tiny_bert():
    """Build a BERT with random weights, two layers and no need of a tokenizer."""

    def make(seed: int = 0, labels: int = 2, **fields):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(vocab_size=15, max_position_embeddings=16, num_labels=labels, **sizes, **fields)
        return BertForSequenceClassification(config)

    return make


@pytest.fixture
def model_folder(tmp_path, tiny_bert):
    """A tiny model with random weights and a tokenizer of ten words."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder, [*SPECIAL.values(), *WORDS], SPECIAL, is_encoder=True)
    tiny_bert().save_pretrained(folder)
    return folder


def _rows(count: int) -> list[tuple[str, str]]:
    return [
        (f"the {WORDS[i % 6]} {WORDS[6 + i % 4]} {WORDS[i % 3]} {i}", "up" if i % 6 < 3 else "down")
        for i in range(count)
    ]


@pytest.fixture
def data_files(tmp_path):
    """Two csv files with the columns `sentence` and `mood`."""
    for name in ("train", "elsewhere"):
        lines = [f"{text},{mood}" for text, mood in _rows(60)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["sentence,mood", *lines]))
    return tmp_path


@pytest.fixture
def examples():
    """Build examples of two classes, or of a regression."""

    def make(count: int = 60, name: str = "here", *, regression: bool = False) -> Examples:
        texts = tuple(text for text, _ in _rows(count))
        groups = tuple(map(str, range(count)))
        if regression:
            return Examples(name, texts, tuple(float(i % 6) for i in range(count)), groups)
        return Examples(name, texts, tuple(int(i % 6 < 3) for i in range(count)), groups, ("down", "up"))

    return make
