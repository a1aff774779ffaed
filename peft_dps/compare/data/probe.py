"""Probes: what a pretrained model can do without fine-tuning, measured on data that training never sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from peft_dps.compare.data.examples import DataError, Examples
from peft_dps.compare.data.metrics import METRICS

LOSS = "loss"
"""The metric that is better the lower it is."""

_BATCH = 32
_MASKED = 0.15  # of the tokens, as in BERT's pretraining
_IGNORED = -100
_LEAST = 10


@dataclass(frozen=True)
class Probe:
    """What is asked of a model before and after training.

    Attributes:
        name: What tables and figures call it.
        examples: Pairs of texts with ratings of how alike they are as labels, or plain passages, whose labels say
            nothing.
    """

    name: str
    examples: Examples

    @property
    def metric(self) -> str:
        """What is measured: of passages the loss, of pairs Spearman's correlation, of two ratings alone the AUC."""
        if not self.examples.pairs:
            return LOSS
        return "AUC" if len(set(self.examples.labels)) == 2 else "spearman"

    def __len__(self) -> int:
        """Return how many texts a model reads."""
        return len({*self.examples.texts, *self.examples.pairs})

    def check(self, model_path: str) -> None:
        """Raise a ValueError if a model cannot be asked."""
        if self.metric == LOSS:
            _language_model(model_path)

    def without(self, texts: Collection[str]) -> Probe:
        """Return the probe without what holds one of some texts, which are trained on.

        Raises:
            DataError: Too little is left.
        """
        rows = zip(self.examples.texts, self.examples.pairs or self.examples.texts, strict=True)
        trained = set(texts)
        kept = self.examples.take([i for i, row in enumerate(rows) if trained.isdisjoint(row)])
        if len(kept) < _LEAST or (kept.pairs and len(set(kept.labels)) < 2):
            raise DataError(
                f"The probe {self.name!r} must have {_LEAST} passages, or as many pairs with different ratings, whose "
                f"texts are not trained on, got {len(kept)} of {len(self.examples)}. Name another probe."
            )
        return replace(self, examples=kept)

    def fingerprint(self) -> str:
        """Return 16 hex digits of a hash over its data."""
        content = [self.examples.texts, self.examples.pairs, self.examples.labels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def measure(
        self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int
    ) -> float:
        """Ask a model; of one that finds all pairs alike, chance is returned.

        Args:
            backbone: The model without its head, in evaluation mode.
            tokenizer: Its tokenizer.
            model_path: Where the pretrained model is loaded from.
            max_length: Longest sequence, in tokens.
        """
        if self.metric == LOSS:
            return token_loss(backbone, tokenizer, self.examples.texts, model_path, max_length)
        place = {text: i for i, text in enumerate(dict.fromkeys((*self.examples.texts, *self.examples.pairs)))}
        embedded = embed(backbone, tokenizer, list(place), max_length)
        first, second = ([place[text] for text in texts] for texts in (self.examples.texts, self.examples.pairs))
        alike = (embedded[first] * embedded[second]).sum(dim=1).numpy()
        ratings = np.asarray(self.examples.labels)
        if self.metric == "spearman":
            return METRICS["spearman"](alike, ratings)
        return float(roc_auc_score(ratings == ratings.max(), alike)) if np.isfinite(alike).all() else 0.5


def token_loss(
    backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], model_path: str, max_length: int
) -> float:
    """Return the mean loss of a token with the head that the model was pretrained with, which is not trained.

    Of a decoder every token is predicted from those before it; of an encoder 15% of the tokens, always the same ones,
    which are masked. Arguments are those of `Probe.measure`.
    """
    model = _language_model(model_path)
    setattr(model, model.base_model_prefix, backbone)
    model.to(_device(backbone)).eval()
    draw = torch.Generator().manual_seed(0)
    total, count = 0.0, 0
    for _, batch in _batches(tokenizer, texts, max_length, return_special_tokens_mask=True):
        unasked = batch.pop("special_tokens_mask").bool() | (batch["attention_mask"] == 0)
        labels = batch["input_ids"].masked_fill(unasked, _IGNORED)
        if _is_masked(model.config):
            labels = labels.masked_fill(torch.rand(labels.shape, generator=draw) >= _MASKED, _IGNORED)
            batch["input_ids"] = batch["input_ids"].masked_fill(labels != _IGNORED, tokenizer.mask_token_id)
        with torch.no_grad():
            logits = model(**{name: tensor.to(_device(backbone)) for name, tensor in batch.items()}).logits.cpu()
        if not _is_masked(model.config):
            logits, labels = logits[:, :-1], labels[:, 1:]
        asked = labels != _IGNORED
        total += float(F.cross_entropy(logits[asked].float(), labels[asked], reduction="sum"))
        count += int(asked.sum())
    return total / max(1, count)


def embed(
    backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> torch.Tensor:
    """Return the embedding of each text, `[N, width]`: the mean of the last hidden states, of length 1."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for places, batch in _batches(tokenizer, texts, max_length):
        batch = {name: tensor.to(_device(backbone)) for name, tensor in batch.items()}
        with torch.no_grad():
            states = backbone(**batch).last_hidden_state.float()
        weights = batch["attention_mask"].unsqueeze(-1)
        means = F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1).cpu()
        for place, mean in zip(places, means, strict=True):
            found[place] = mean
    return torch.stack(found)


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, **options: bool
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield batches of texts of about one length, with their places among the texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    fitting: dict[str, Any] = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    for first in range(0, len(order), _BATCH):
        places = order[first : first + _BATCH]
        yield places, dict(tokenizer([texts[i] for i in places], **fitting, **options))


def _is_masked(config: Any) -> bool:
    return type(config) in AutoModelForMaskedLM._model_mapping


def _language_model(model_path: str) -> Any:
    """Load a model with the head that it was pretrained with."""
    config = AutoConfig.from_pretrained(model_path)
    kind = AutoModelForMaskedLM if _is_masked(config) else AutoModelForCausalLM
    if config.is_encoder_decoder or type(config) not in kind._model_mapping:
        raise ValueError(
            f"`probes` can ask for the loss on a text of an encoder or of a decoder, got the model {model_path!r} of "
            f"type {config.model_type!r}. Leave the text out."
        )
    loaded: Any = kind.from_pretrained(model_path, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"`probes` can ask for the loss on a text of a model with the head that it was pretrained with, got "
            f"{model_path!r}, which was saved without ({', '.join(missing[:3])}). Leave the text out."
        )
    return model


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
