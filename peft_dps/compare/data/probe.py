"""Probes: what a pretrained model can do without fine-tuning, measured on data that training never sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

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


class Probe(Protocol):
    """What is asked of a model before and after training.

    Attributes:
        name: What tables and figures call it.
        metric: Name of what is measured; `LOSS` is better the lower, all others the higher.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def metric(self) -> str: ...  # noqa: D102

    def __len__(self) -> int:
        """Return how many texts the model reads."""

    def check(self, model_path: str) -> None:
        """Raise a ValueError if a model cannot be asked."""

    def without(self, texts: Collection[str]) -> Probe:
        """Return the probe without what is among some texts, which are trained on."""

    def fingerprint(self) -> str:
        """Return 16 hex digits of a hash over its data."""

    def measure(
        self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int
    ) -> float:
        """Ask a model.

        Args:
            backbone: The model without its head, in evaluation mode.
            tokenizer: Its tokenizer.
            model_path: Where the pretrained model is loaded from.
            max_length: Longest sequence, in tokens.
        """


@dataclass(frozen=True)
class RatedPairs:
    """Pairs of texts with ratings of how alike they are: does the model find alike what people do?

    The model's rating is the cosine of the embeddings, which are the means of the last hidden states over the tokens.
    It is compared with the given one by Spearman's correlation. If there are two ratings alone, it is the area under
    the ROC curve: how often the model finds a pair of the higher rating more alike than one of the lower rating.

    Args:
        name: What tables and figures call it.
        examples: The pairs, with ratings as labels.
    """

    name: str
    examples: Examples

    @property
    def metric(self) -> str:
        """Name of what is measured."""
        return "AUC" if len(set(self.examples.labels)) == 2 else "spearman"

    def __len__(self) -> int:
        """Return how many different texts there are."""
        return len({*self.examples.texts, *self.examples.pairs})

    def check(self, model_path: str) -> None:
        """Accept every model."""

    def without(self, texts: Collection[str]) -> RatedPairs:
        """Return the probe without pairs of which one text is trained on.

        Raises:
            DataError: Too few are left.
        """
        both = zip(self.examples.texts, self.examples.pairs, strict=True)
        kept = self.examples.take([i for i, pair in enumerate(both) if not set(pair) & set(texts)])
        if len(kept) < _LEAST or len(set(kept.labels)) < 2:
            raise DataError(
                f"The probe {self.name!r} must have {_LEAST} pairs or more with different ratings whose texts are not "
                f"trained on, got {len(kept)} of {len(self.examples)}. Name another probe."
            )
        return replace(self, examples=kept)

    def fingerprint(self) -> str:
        """Return 16 hex digits of a hash over the pairs and their ratings."""
        return _hash([self.examples.texts, self.examples.pairs, self.examples.labels])

    def measure(
        self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int
    ) -> float:
        """Return the correlation or the area; of a model that finds all pairs alike, that of chance."""
        place = {text: i for i, text in enumerate(dict.fromkeys((*self.examples.texts, *self.examples.pairs)))}
        embedded = embed(backbone, tokenizer, list(place), max_length)
        first, second = ([place[text] for text in texts] for texts in (self.examples.texts, self.examples.pairs))
        alike = (embedded[first] * embedded[second]).sum(dim=1).numpy()
        ratings = np.asarray(self.examples.labels)
        if self.metric == "spearman":
            return METRICS["spearman"](alike, ratings)
        return float(roc_auc_score(ratings == ratings.max(), alike)) if np.isfinite(alike).all() else 0.5


@dataclass(frozen=True)
class Passages:
    """Plain text: how well does the model still predict it, with the head that it was pretrained with?

    Of a decoder every token is predicted from those before it; of an encoder 15% of the tokens, always the same ones,
    which are masked. The head is that of the pretrained model, and is not trained.

    Args:
        name: What tables and figures call it.
        texts: Passages.
    """

    name: str
    texts: tuple[str, ...]
    metric: str = LOSS

    def __len__(self) -> int:
        """Return how many passages there are."""
        return len(self.texts)

    def check(self, model_path: str) -> None:
        """Raise a ValueError if the model was saved without the head that it was pretrained with."""
        _language_model(self.name, model_path)

    def without(self, texts: Collection[str]) -> Passages:
        """Return the probe without passages that are trained on.

        Raises:
            DataError: None is left.
        """
        kept = tuple(text for text in self.texts if text not in set(texts))
        if not kept:
            raise DataError(
                f"The probe {self.name!r} must have text that is not trained on, got {len(self.texts)} passages that "
                "are. Name another file."
            )
        return replace(self, texts=kept)

    def fingerprint(self) -> str:
        """Return 16 hex digits of a hash over the passages."""
        return _hash(self.texts)

    def measure(
        self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int
    ) -> float:
        """Return the mean loss of a token that is predicted."""
        model = _language_model(self.name, model_path)
        setattr(model, model.base_model_prefix, backbone)
        model.to(_device(backbone)).eval()
        draw = torch.Generator().manual_seed(0)
        total, count = 0.0, 0
        for _, batch in _batches(tokenizer, self.texts, max_length, special=True):
            special = batch.pop("special_tokens_mask").bool()
            labels = batch["input_ids"].masked_fill(special | (batch["attention_mask"] == 0), _IGNORED)
            if _is_masked(model.config):
                chosen = torch.rand(labels.shape, generator=draw) < _MASKED
                labels = labels.masked_fill(~chosen, _IGNORED)
                batch["input_ids"] = batch["input_ids"].masked_fill(labels != _IGNORED, tokenizer.mask_token_id)
            with torch.no_grad():
                logits = model(**{name: tensor.to(_device(backbone)) for name, tensor in batch.items()}).logits.cpu()
            if not _is_masked(model.config):
                logits, labels = logits[:, :-1], labels[:, 1:]
            predicted = labels != _IGNORED
            total += float(F.cross_entropy(logits[predicted].float(), labels[predicted], reduction="sum"))
            count += int(predicted.sum())
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
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, special: bool = False
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield batches of texts of about one length, with their places among the texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in range(0, len(order), _BATCH):
        places = order[first : first + _BATCH]
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": max_length}
        options.update(return_tensors="pt", return_special_tokens_mask=special)
        yield places, dict(tokenizer([texts[i] for i in places], **options))


def _is_masked(config: Any) -> bool:
    return type(config) in AutoModelForMaskedLM._model_mapping


def _language_model(probe: str, model_path: str) -> Any:
    """Load a model with the head that it was pretrained with."""
    config = AutoConfig.from_pretrained(model_path)
    kind = AutoModelForMaskedLM if _is_masked(config) else AutoModelForCausalLM
    if config.is_encoder_decoder or type(config) not in kind._model_mapping:
        raise ValueError(
            f"`probes`: {probe!r} asks for the loss of an encoder or of a decoder, got the model {model_path!r} of "
            f"type {config.model_type!r}. Leave the probe out."
        )
    model, loading = kind.from_pretrained(model_path, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"`probes`: {probe!r} needs the head that the model was pretrained with, and {model_path!r} was saved "
            f"without ({', '.join(missing[:3])}). Leave the probe out, or name a model that has it."
        )
    return model


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
