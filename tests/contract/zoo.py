"""Whole models of transformers, tiny and randomly initialised: one of each kind that DPS is promised to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dps import DPSConfig
from tests.device import DEVICE

VOCABULARY = 40
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0, "eos_token_id": None}
NARROW = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
SEQ_TO_SEQ = {
    **NARROW,
    "vocab_size": VOCABULARY,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
IDS = torch.arange(2, 26).view(4, 6)
IMAGES = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8).sin()
CLASSES = torch.tensor([0, 1, 2, 0])
CONVOLUTIONS = r".*(convolution|shortcut\.convolution)"


@dataclass(frozen=True)
class Whole:
    """A whole model with a batch that it can learn from. `base()` gives the same weights each time."""

    name: str
    make: Callable[[], nn.Module]
    batch: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    generate: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for values in (self.batch, self.generate or {}):
            values.update({name: value.to(DEVICE) for name, value in values.items() if torch.is_tensor(value)})

    def __str__(self) -> str:
        return self.name

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval().to(DEVICE)

    def config(self, **options: Any) -> DPSConfig:
        return DPSConfig(**{"stage_steps": 2, "density": 0.5, **self.options, **options})

    def model(self, **options: Any) -> PeftModel:
        return get_peft_model(self.base(), self.config(**options)).eval()

    def output(self, model: nn.Module) -> torch.Tensor:
        """Everything the model predicts, as one row of numbers."""
        with torch.no_grad():
            output = model(**self.batch)
        names = ("logits", "start_logits", "end_logits", "last_hidden_state", "logits_per_image")
        return torch.cat([output[name].flatten() for name in names if output.get(name) is not None])

    def loss(self, model: nn.Module) -> torch.Tensor:
        output = model(**self.batch)
        return output.loss if output.get("loss") is not None else (output.last_hidden_state[:, 0] - 1).relu().mean()

    def train(self, model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
        """Train with AdamW, and return the losses."""
        optimizer = optimizer or self.optimizer(model)
        losses = []
        model.train()
        for _ in range(steps):
            loss = self.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        return losses

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def classifier(name: str, model: type[nn.Module], config: Any) -> Whole:
    return Whole(name, lambda: model(config), {"input_ids": IDS, "labels": CLASSES}, {"task_type": "SEQ_CLS"})


def decoder(name: str, model: type[nn.Module], config: Any) -> Whole:
    batch = {"input_ids": IDS, "labels": IDS}
    return Whole(name, lambda: model(config), batch, {"task_type": "CAUSAL_LM"}, {"input_ids": IDS[:, :4]})


def seq_to_seq(name: str, model: type[nn.Module], config: Any) -> Whole:
    batch = {"input_ids": IDS, "labels": IDS}
    return Whole(name, lambda: model(config), batch, {"task_type": "SEQ_2_SEQ_LM"}, {"input_ids": IDS})


def make_clip() -> nn.Module:
    text = {**ENCODER, "projection_dim": 8, "bos_token_id": 0, "eos_token_id": 25}
    vision = {**ENCODER, "image_size": 8, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


BERT = hf.BertConfig(**ENCODER, **NO_DROPOUT, num_labels=3)
ROBERTA = hf.RobertaConfig(**ENCODER, **NO_DROPOUT, num_labels=3, pad_token_id=1)
DEBERTA = hf.DebertaV2Config(
    **ENCODER, **NO_DROPOUT, num_labels=3, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
    norm_rel_ebd="layer_norm", share_att_key=True, pooler_dropout=0.0,
)  # fmt: skip
ELECTRA = hf.ElectraConfig(**ENCODER, **NO_DROPOUT, embedding_size=8, num_labels=3)
GPT2 = hf.GPT2Config(
    vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=24, attn_pdrop=0.0, embd_pdrop=0.0,
    resid_pdrop=0.0, bos_token_id=0, eos_token_id=None,
)  # fmt: skip
T5 = hf.T5Config(
    vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
    feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=None,
)  # fmt: skip
BART = hf.BartConfig(
    **SEQ_TO_SEQ, max_position_embeddings=24, pad_token_id=1, bos_token_id=0, eos_token_id=None,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
WHISPER = hf.WhisperConfig(
    **SEQ_TO_SEQ, num_mel_bins=4, max_source_positions=8, max_target_positions=24, decoder_start_token_id=2,
    pad_token_id=1, bos_token_id=0, eos_token_id=None, suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
VIT = hf.ViTConfig(**{**ENCODER, "image_size": 8, "patch_size": 4, "num_labels": 3})
RESNET = hf.ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 2],
    layer_type="basic",
    num_labels=3,
    downsample_in_first_stage=True,
)
SOUND = torch.linspace(-1, 1, 4 * 4 * 16).view(4, 4, 16).sin()

ZOO = [
    classifier("BERT, sequence classification", hf.BertForSequenceClassification, BERT),
    Whole(
        "BERT, token classification",
        lambda: hf.BertForTokenClassification(BERT),
        {"input_ids": IDS, "labels": IDS % 3},
        {"task_type": "TOKEN_CLS"},
    ),
    Whole(
        "BERT, question answering",
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**ENCODER, **NO_DROPOUT)),
        {"input_ids": IDS, "start_positions": CLASSES, "end_positions": CLASSES + 2},
        {"task_type": "QUESTION_ANS"},
    ),
    Whole(
        "BERT, feature extraction",
        lambda: hf.BertModel(BERT, add_pooling_layer=False),
        {"input_ids": IDS},
        {"task_type": "FEATURE_EXTRACTION"},
    ),
    classifier("RoBERTa", hf.RobertaForSequenceClassification, ROBERTA),
    classifier("DeBERTa-v2", hf.DebertaV2ForSequenceClassification, DEBERTA),
    classifier("ELECTRA", hf.ElectraForSequenceClassification, ELECTRA),
    decoder("GPT-2", hf.GPT2LMHeadModel, GPT2),
    decoder("Llama", hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER)),
    decoder("Qwen 3", hf.Qwen3ForCausalLM, hf.Qwen3Config(**DECODER)),
    decoder("Gemma 3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**DECODER, sliding_window=4)),
    seq_to_seq("T5", hf.T5ForConditionalGeneration, T5),
    seq_to_seq("BART", hf.BartForConditionalGeneration, BART),
    Whole("Whisper", lambda: hf.WhisperForConditionalGeneration(WHISPER), {"input_features": SOUND, "labels": IDS},
          generate={"input_features": SOUND}),  # PEFT's model for SEQ_2_SEQ_LM passes `input_ids`
    Whole("ViT", lambda: hf.ViTForImageClassification(VIT), {"pixel_values": IMAGES, "labels": CLASSES},
          {"modules_to_save": ["classifier"]}),
    Whole("CLIP", make_clip, {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True}),
    Whole("ResNet", lambda: hf.ResNetForImageClassification(RESNET), {"pixel_values": IMAGES, "labels": CLASSES},
          {"target_modules": CONVOLUTIONS, "modules_to_save": ["classifier", "normalization"]}),
]  # fmt: skip
