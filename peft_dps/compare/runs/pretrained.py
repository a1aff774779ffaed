"""The pretrained model and its tokenizer: checked before anything runs, and loaded with a head, without notices."""

from __future__ import annotations

import warnings

import torch
from datasets.utils.logging import disable_progress_bar
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from peft_dps.compare.data.task import Task

# Models whose first position comes after that of the padding token, so that there are fewer for texts.
_COUNT_FROM_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def quieten() -> None:
    """Keep the libraries' progress bars and notices out of ours."""
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|datasets)\.")


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; where it has no padding token, the end of the text pads."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes where there are no files
        raise OSError("There is no vocabulary.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    task: Task, model_path: str, seed: int, tokenizer: PreTrainedTokenizerBase, attention: str | None = None
) -> PreTrainedModel:
    """Load the pretrained model; a head that it lacks, or that has another size, is drawn by the seed."""
    set_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        num_labels=task.num_labels,
        problem_type="regression" if task.is_regression else None,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        attn_implementation=attention,
    )
    # Decoders look for the last token before the padding by it, and what pads is the tokenizer's.
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model


def check_model(model_path: str) -> None:
    """Check that a model and its tokenizer exist and that it can get a head for the tasks.

    Raises:
        ValueError: It cannot.
        OSError: It cannot be found.
    """
    remedy = "it must be a Hub id that can be reached, or a folder with a model and its tokenizer."
    try:
        config = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise OSError(f"`model` {model_path!r} cannot be loaded, {remedy} {error}") from error
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(
            f"`model` must be one that transformers can give a classification head, got {model_path!r}, whose type is "
            f"{config.model_type!r}."
        )
    try:
        tokenizer = load_tokenizer(model_path)
    except (OSError, ValueError, ImportError) as error:
        raise OSError(f"The tokenizer of `model` {model_path!r} cannot be loaded, {remedy} {error}") from error
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of `model` {model_path!r} has no token to pad batches with, and none that ends a text. "
            "Set its `pad_token` and save it beside the model."
        )


def longest_input(model_path: str, wanted: int) -> int:
    """Return the longest sequence up to `wanted` tokens that a model and its tokenizer take."""
    config = AutoConfig.from_pretrained(model_path)
    positions = getattr(config, "max_position_embeddings", wanted)
    if config.model_type in _COUNT_FROM_PADDING:
        positions -= config.pad_token_id + 1
    return min(wanted, positions, load_tokenizer(model_path).model_max_length)
