"""LT-SFT (Ansell et al., ACL 2022, arXiv:2110.07560)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def lt_sft(**fields: Any) -> DPSConfig:
    """LT-SFT: train everything, keep the entries that moved most, abs(W - W0), and train these again from W0.

    A training leaves a sparse difference to the pretrained weights, for adapters that are to be added up (languages
    and tasks, in the paper) or shared in small files. The first phase costs what full fine-tuning does. The paper
    trains 8% of the entries of a multilingual BERT, 3 epochs in the first and 10 in the second phase.

    In the second phase the released code begins everything anew; here targeted weights, their biases and their
    optimizer state begin anew, and the learning rate's schedule and `modules_to_save` go on. There entries of biases,
    norms and embeddings are selected too; here biases are trained in full, unless `train_bias=False`.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise; `stage_steps` is the length of the first phase.
    """
    paper: dict[str, Any] = {
        "density": 0.08,
        "schedule": "two-phase",
        "stage_steps": 0.25,
        "score": "movement",
        "scope": "model",
    }
    return DPSConfig(**{**paper, **fields})
