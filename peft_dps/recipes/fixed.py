"""Methods that select once, without a look at gradients."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig

# What attention and feed-forward parts end with, in LLaMA, GPT-2, BERT, DistilBERT, OPT, T5 and ModernBERT.
_OUTPUTS = r".*\.(o_proj|out_proj|down_proj|c_proj|output\.dense|dense_4h_to_h|out_lin|lin2|fc2|[wW]o|o)"
_COMPACT: dict[str, Any] = {"schedule": "once", "score_steps": 0, "storage": "compact", "train_bias": False}


def random_mask(**fields: Any) -> DPSConfig:
    """5% of the entries of each weight, selected once, at random: what scores have to beat at the same density.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**{**_COMPACT, "score": "random", "density": 0.05, **fields})


def magnitude(**fields: Any) -> DPSConfig:
    """The 5% of entries of each weight where the pretrained weight is largest: score = abs(W0).

    A baseline that needs no data. It finds what matters to the pretrained model, and not to the task.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**{**_COMPACT, "score": "magnitude", "density": 0.05, **fields})


def dsee(**fields: Any) -> DPSConfig:
    """The sparse part of DSEE (Chen et al., ACL 2023, arXiv:2111.00160): where a low rank cannot hold the weight.

    W0 is taken apart as U V + S, U V of rank 16. Of each weight the 0.01% of entries where abs(S) is largest are
    trained: 59 of 768 x 768, where DSEE takes 64 of every weight. It needs no data, trains hardly anything, and costs
    one singular value decomposition of each weight.

    DSEE finds U, V and S together by greedy steps (GreBsmo); here U V is the best approximation of its rank, and S
    what it leaves. DSEE trains a LoRA of rank 16 beside the entries, and prunes W0: both are left out here.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(**{**_COMPACT, "score": "low_rank_residual", "density": 1e-4, **fields})


def paca(**fields: Any) -> DPSConfig:
    """PaCA (Woo et al., ICLR 2025, arXiv:2503.01905): 16 columns of each weight, drawn at random.

    As many parameters as a LoRA of rank 8 of a square weight. Nothing is computed beside the base layer but the
    columns' own products, and the backward pass keeps 16 columns of each input. It needs no data to select from.

    Their code divides the trained columns by `alpha / r` and multiplies them again in each forward, which makes
    updates of AdamW `alpha / r` times as large; here they are trained as they are: multiply the learning rate instead.
    They write into the pretrained weight; here the difference is held beside it, and weight decay pulls that to 0.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    return DPSConfig(
        **{**_COMPACT, "granularity": "column", "score": "random", **_units_or_density(16, fields), **fields}
    )


def s2ft(**fields: Any) -> DPSConfig:
    """S2FT (Yang et al., NeurIPS 2024, arXiv:2412.06289): random channels of the output and down projections.

    Columns of `o_proj` are channels of attention heads, columns of `down_proj` channels of the MLP. Three of a hundred
    are trained, drawn at random. Other models have other names for
    these, and common ones are known; give `target_modules` for more.

    S2FT pairs each of these matrices with the one before it (value and output, up and down projection), whose rows
    make the same channels, and moves selected channels next to each other so that they are a slice. Where only the
    output and down projections are trained, as here, the pairing changes no result, and is left out. It draws whole
    attention heads, and over all layers at once; here single channels are drawn, and as many in each weight. To train
    both sides of a pair in the same channels is not possible: units of each weight are drawn by themselves.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    chosen = {"granularity": "column", "score": "random", "density": 0.03, "target_modules": _OUTPUTS}
    return DPSConfig(**{**_COMPACT, **chosen, **fields})


def _units_or_density(units: int, fields: dict[str, Any]) -> dict[str, int]:
    """Return a number of units, unless a density is given in place of it."""
    return {} if "density" in fields else {"units": units}
