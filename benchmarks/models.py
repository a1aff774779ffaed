"""The models, built from configurations with random weights, and a batch for each: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.settings import DECODER, SIZES, Settings


def config_of(settings: Settings) -> PretrainedConfig:
    """Return the configuration of the model."""
    fields = SIZES[settings.size]
    if settings.kind == DECODER:
        return Qwen2Config(**fields, attention_dropout=settings.dropout, use_cache=False)
    return BertConfig(**fields, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout)


def build_model(settings: Settings) -> PreTrainedModel:
    """Build the model with random weights, on its device."""
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return _class_of(settings)(config_of(settings))


def load_model(settings: Settings, folder: Path) -> PreTrainedModel:
    """Load the model from a folder to which `save_pretrained` has written it, to its device."""
    return _class_of(settings).from_pretrained(folder).to(settings.device)


def load_in_4_bits(settings: Settings, folder: Path) -> PreTrainedModel:
    """Load the model from a folder, its linear layers in 4 bits (NF4) that compute in bf16, and the rest in bf16."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    placed = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": settings.device}}
    return _class_of(settings).from_pretrained(folder, **placed)


def make_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """Make a batch of random tokens, on the model's device.

    Returns:
        Arguments of the model's forward: token ids and attention mask `[batch, tokens]`, and labels, `[batch]` classes
        for an encoder and the tokens themselves for a decoder.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch, settings.tokens)
    ids = torch.randint(config_of(settings).vocab_size, shape, generator=generator)
    labels = ids if settings.kind == DECODER else torch.randint(2, shape[:1], generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64), "labels": labels}
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def _class_of(settings: Settings) -> type[PreTrainedModel]:
    return Qwen2ForCausalLM if settings.kind == DECODER else BertForSequenceClassification
