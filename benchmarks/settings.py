"""`Settings`: what a benchmark run measures on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ENCODER, DECODER = "encoder", "decoder"
_TOY = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
# Fields of BertConfig.
ENCODERS: dict[str, dict[str, Any]] = {
    "base": {},  # what BertConfig gives: BERT-base
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "medium": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "small": _SMALL,
    "toy": {**_TOY, "num_hidden_layers": 1},
    "toy-pair": {**_TOY, "num_hidden_layers": 2},
}
_HALF_BILLION = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}
# Fields of Qwen2Config.
DECODERS: dict[str, dict[str, Any]] = {
    "decoder-0.5b": _HALF_BILLION,
    "decoder-0.5b-32k": {**_HALF_BILLION, "vocab_size": 32000},
    "decoder-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "tie_word_embeddings": True,
    },
    "decoder-small": {**_SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "decoder-toy": {**_TOY, "num_hidden_layers": 1, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "decoder-toy-pair": {**_TOY, "num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
SIZES = {**ENCODERS, **DECODERS}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw-fused": {"fused": True},
    "adamw-foreach": {"foreach": True},
}


@dataclass(frozen=True)
class Settings:
    """Settings of one run, the same for every variant.

    Attributes:
        size: Name of the model, one of `SIZES`.
        batch: Sequences in a batch.
        tokens: Tokens in a sequence.
        optimizer: Name of the optimizer, one of `OPTIMIZERS`.
        density: Fraction of entries in the subnetwork.
        stage_steps: Steps in a stage.
        cycles: Cycles to train.
        warmup: Rounds at the start that the figures leave out.
        dropout: Dropout of the model; a decoder has it in the attention only.
        threads: Threads to compute on; None for torch's own choice.
        seed: Seed of weights, batch and dropout.
        device: "cpu" or "cuda".
    """

    size: str = "base"
    batch: int = 16
    tokens: int = 64
    optimizer: str = "adamw-fused"
    density: float = 0.7
    stage_steps: int = 4
    cycles: int = 5
    warmup: int = 2
    dropout: float = 0.1
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    @property
    def rounds(self) -> int:
        """Steps that each variant takes."""
        return 2 * self.stage_steps * self.cycles

    @property
    def kind(self) -> str:
        """`ENCODER` or `DECODER`."""
        return ENCODER if self.size in ENCODERS else DECODER
