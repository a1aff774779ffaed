"""Tiny models, tokenizers and tables in a folder, under the names that README and the tutorial have for real ones.

`from_pretrained(name)` takes a folder of that name in the working directory before it looks anywhere else.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DECODER = "HuggingFaceTB/SmolLM2-1.7B"
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "eos_token": "[END]",
}
WORDS = [*SPECIAL.values(), "the", "film", "was", "very", "good", "dull", "i", "loved", "hated", "plot", "and"]


def write_models(folder: Path) -> None:
    """Write an encoder and a decoder with their tokenizers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, hidden_size=32, intermediate_size=64)).save_pretrained(folder / ENCODER)
    llama = LlamaConfig(
        **sizes, hidden_size=64, intermediate_size=128, pad_token_id=0, bos_token_id=None, eos_token_id=4
    )
    LlamaForCausalLM(llama).save_pretrained(folder / DECODER)
    write_tokenizer(folder / ENCODER, WORDS, SPECIAL, is_encoder=True)
    write_tokenizer(folder / DECODER, WORDS, SPECIAL, is_encoder=False)


def write_tokenizer(folder: Path, words: list[str], special: dict[str, str], *, is_encoder: bool) -> None:
    """Write a tokenizer of whole words, which any version of transformers reads.

    Args:
        folder: Where it goes.
        words: All words, special ones first; of an encoder the third begins a text, and the fourth ends one.
        special: What the special ones are.
        is_encoder: Whether texts begin and end with them.
    """
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=special["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if is_encoder:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_tables(folder: Path) -> None:
    """Write a table of reviews with labels, and one of texts."""
    reviews = [
        (f"the film was {'very ' if row % 3 else ''}{'good' if row % 2 else 'dull'}", row % 2) for row in range(96)
    ]
    texts = [(f"i {'loved' if row % 2 else 'hated'} the film and the plot",) for row in range(48)]
    for name, head, rows in (("reviews.csv", ("text", "label"), reviews), ("texts.csv", ("text",), texts)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])
