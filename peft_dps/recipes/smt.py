"""SMT (He et al., ICLR 2025, arXiv:2405.15525)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig

# Query, key and value projections of LLaMA and its like, BERT, DistilBERT, T5, GPT-2 and others that have one for all.
_QUERY_KEY_VALUE = r".*\.([qkv]_proj|query|key|value|[qkv]_lin|[qkv]|c_attn|query_key_value|qkv_proj|Wqkv)"


def smt(**fields: Any) -> DPSConfig:
    """SMT (He et al., ICLR 2025, arXiv:2405.15525): tiles of 256 x 256 of the attention's inputs, chosen by gradient.

    score of a tile = mean of abs(G) over it and the first 100 steps. Of the tiles of all `q_proj`, `k_proj` and
    `v_proj` the best 3.5% are trained: 0.84% of LLaMA-7B. Other models have other names for these, and common ones
    are known; give `target_modules` for more. With several processes select before the model is wrapped
    (`score_steps=0` and `model.dps_score(batches)`), or use `scope="tensor"`.

    Their code adds up gradients over the steps and takes absolute values at the end; here absolute values are added
    up, of each pass. Its 100 steps train every weight; here they train nothing.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "submatrix",
        "score": "absolute_gradient",
        "density": 0.035,
        "scope": "model",
        "target_modules": _QUERY_KEY_VALUE,
        "schedule": "once",
        "score_steps": 100,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
