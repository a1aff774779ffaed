"""The sparse part of DSEE (Chen et al., ACL 2023, arXiv:2111.00160)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def dsee(**fields: Any) -> DPSConfig:
    """The sparse part of DSEE (Chen et al., ACL 2023, arXiv:2111.00160): where a low rank cannot hold the weight.

    W0 = U V + S, with U V of rank 16. Of each weight the 0.01% of entries where abs(S) is largest are trained: 59 of
    768 x 768, where DSEE takes 64 of every weight. It needs no data, and one singular value decomposition of each
    weight.

    DSEE finds U, V and S together by greedy steps; here U V is the best approximation of its rank. DSEE trains a LoRA
    of rank 16 beside the entries, and prunes W0: both are left out here.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise.
    """
    paper: dict[str, Any] = {
        "storage": "compact",
        "score": "low_rank_residual",
        "density": 1e-4,
        "schedule": "once",
        "score_steps": 0,
        "train_bias": False,
    }
    return DPSConfig(**{**paper, **fields})
