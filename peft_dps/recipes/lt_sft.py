"""LT-SFT (Ansell et al., ACL 2022, arXiv:2110.07560)."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig


def lt_sft(**fields: Any) -> DPSConfig:
    """LT-SFT: train everything, keep the entries that moved most, abs(W - W0), and train these again from W0.

    What is left of a training is a sparse difference to the pretrained weights, for adapters that are to be added up
    (languages and tasks, in the paper) or shared in small files. The first phase costs what full fine-tuning does.

    The released code begins anew in the second phase with the learning rate, the order of the data, the head and all
    other parameters; here targeted weights, their biases and the optimizer's state of both begin anew, and the
    schedule of the learning rate and `modules_to_save` go on. There the entries of biases, layer norms and embeddings
    are selected too; here biases are trained in full, unless `train_bias=False`. Exactly ceil(n * density) of all
    targeted entries are selected, ties by position. It trains 14 155 776 entries, 8% of those of a multilingual BERT,
    3 epochs in the first and 10 in the second phase; its penalty on the size of the difference, which is off by
    default, belongs into the loss.

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
