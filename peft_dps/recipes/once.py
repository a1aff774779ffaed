"""Methods that select once, from gradients of the pretrained model."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig

_BY_FISHER: dict[str, Any] = {"schedule": "once", "score_steps": 0, "scope": "model"}
# Query, key and value projections of LLaMA and its like, BERT, DistilBERT, T5, GPT-2 and others that have one for all.
_QUERY_KEY_VALUE = r".*\.([qkv]_proj|query|key|value|[qkv]_lin|[qkv]|c_attn|query_key_value|qkv_proj|Wqkv)"
_BY_SIZE: dict[str, Any] = {
    "schedule": "once",
    "score": "absolute_gradient",
    "storage": "compact",
    "train_bias": False,
}


def child_tuning_d(**fields: Any) -> DPSConfig:
    """Child-Tuning-D (Xu et al., EMNLP 2021, arXiv:2109.05687): the entries of highest Fisher information, of all.

    F = mean over the data of (d log p(y | x) / dW)^2 is gathered before training, and the 30% of all entries where it
    is largest are trained: the gradient of the others is 0. As in the paper, weight decay moves them all the same, and
    modules that are no targets are trained in full. For few data; it costs what full fine-tuning does, and a pass over
    the data: `model.score(batches, per_example=True)`.

    Their code squares the gradients of batches, clipped (`model.score(batches)`, without the clipping), and masks
    biases and norms of the encoder too; here biases and norms are trained.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    chosen = {"frozen": "gradient", "density": 0.3, "train_remaining": True}
    return DPSConfig(**{**_BY_FISHER, **chosen, **fields})


def fish(**fields: Any) -> DPSConfig:
    """FISH mask (Sung et al., NeurIPS 2021, arXiv:2111.09839): 0.5% of all entries, of highest Fisher information.

    F = sum over 1024 examples of (d log p(y | x) / dW)^2, with the labels of the data: the empirical Fisher. Gather it
    by `model.score(batches, per_example=True)`, with batches of as many examples. An adapter of a size to share; each
    layer's backward pass still makes one whole gradient of its weight, and an entry takes 8 bytes in a file.

    Their code ranks all parameters, biases and norms too, and trains the classifier in full (`modules_to_save`); here
    weights of targets are ranked.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**{**_BY_FISHER, "storage": "compact", "density": 0.005, "train_bias": False, **fields})


def sift(**fields: Any) -> DPSConfig:
    """SIFT (Song et al., 2023, arXiv:2312.11875): the 5% of each weight where the first gradient is largest.

    score = abs(G) of the first step, which trains nothing. 5% is for instruction tuning; on GLUE they train 0.8% of
    the attention's weights. It costs what `fish` does, without a pass before training.

    Their code takes the gradient of the first backward pass alone; here it is that of the first step, in which
    gradient accumulation adds up the absolute values of all passes. It selects int(n * density) + 1 entries, here
    ceil(n * density). Weight decay has no effect in their code, since what it decays is 0 before each step; here it
    pulls to the pretrained weight.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**{**_BY_SIZE, "score_steps": 1, "density": 0.05, **fields})


def smt(**fields: Any) -> DPSConfig:
    """SMT (He et al., ICLR 2025, arXiv:2405.15525): tiles of 256 x 256 of the attention's inputs, chosen by gradient.

    score of a tile = mean of abs(G) over it and the first 100 steps. Of the tiles of all `q_proj`, `k_proj` and
    `v_proj` the best 3.5% are trained: 0.84% of LLaMA-7B. Beside the base layer's own, passes compute the products of
    the tiles alone; a step of scoring makes one layer's whole gradient at a time.
    Other models have other names for these, and common ones are known; give `target_modules` for more.

    Their code adds up gradients over the steps and takes absolute values at the end; here absolute values are added
    up, of each pass. Its 100 steps train every weight; here they train nothing, and the base is never written (with
    `storage="copy"` they train the targets). With several processes select before the model is wrapped
    (`score_steps=0` and `model.score(batches)`), or use `scope="tensor"`.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    chosen = {"granularity": "submatrix", "scope": "model", "score_steps": 100, "density": 0.035}
    return DPSConfig(**{**_BY_SIZE, **chosen, "target_modules": _QUERY_KEY_VALUE, **fields})
