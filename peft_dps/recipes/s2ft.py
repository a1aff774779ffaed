"""S2FT (Yang et al., NeurIPS 2024, arXiv:2412.06289)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig

# What attention and feed-forward parts end with, in LLaMA, GPT-2, BERT, DistilBERT, OPT, T5 and ModernBERT.
_OUTPUTS = r".*\.(o_proj|out_proj|down_proj|c_proj|output\.dense|dense_4h_to_h|out_lin|lin2|fc2|[wW]o|o)"


def s2ft(**fields: Any) -> DPSConfig:
    """S2FT (Yang et al., NeurIPS 2024, arXiv:2412.06289): random channels of the output and down projections.

    Columns of `o_proj` are channels of attention heads, columns of `down_proj` channels of the MLP. Three of a hundred
    are trained, drawn at random. Other models have other names for these, and common ones are known; give
    `target_modules` for more.

    S2FT pairs each of these matrices with the one before it, and moves selected channels next to each other. Where
    only the output and down projections are trained, as here, that changes no result, and is left out. It draws whole
    attention heads, over all layers at once; here single channels are drawn, and as many in each weight.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "granularity": "column",
        "score": "random",
        "density": 0.03,
        "target_modules": _OUTPUTS,
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
