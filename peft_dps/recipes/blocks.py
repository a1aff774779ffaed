"""Methods that train a few layers of the model at a time."""

from __future__ import annotations

from typing import Any

from peft_dps.tuner.config import DPSConfig

# An untrained block shares the base model's memory; others are selected without a look at gradients.
_BLOCKS: dict[str, Any] = {
    "storage": "compact",
    "granularity": "block",
    "schedule": "every",
    "score_steps": 0,
    "train_bias": False,
}


def lisa(**fields: Any) -> DPSConfig:
    """LISA: `units` layers of the model at random, others every `stage_steps` (Pan et al., arXiv:2403.17919).

    Embeddings and the head are trained from beginning to end, with an optimizer state that stays. The defaults, two
    layers for 20 steps each, are those of the released code.

    Use it where the optimizer's state of all weights does not fit in memory. Gradients and optimizer state exist for
    the selected layers alone. A layer that was trained once keeps a copy of its weights beside the base model's, so
    that in the end the adapter is as large as the layers that had their turn. As embeddings are trained, each backward
    pass goes through all layers; with `train_remaining=False` it ends at the lowest selected one.

    The state of a layer that leaves is dropped, and one that enters begins with none, bias correction included; one
    that is selected twice in a row keeps its own. The released code leaves all states to the optimizer. Norms inside
    of the layers are trained all the time, as embeddings are, and biases of the layers not at all; in the released
    code both go with their layer.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise. A `density` takes the place of `units`.
    """
    sampled = {"score": "random", "units": None if "density" in fields else 2, "stage_steps": 20}
    return DPSConfig(**{**_BLOCKS, "train_remaining": True, **sampled, **fields})


def badam(**fields: Any) -> DPSConfig:
    """BAdam: one layer of the model after the other (Luo et al., NeurIPS 2024, arXiv:2404.02827).

    Layers take turns in ascending order. Each is trained for `stage_steps` steps of the optimizer, 100 by default as
    in the authors' runs on Llama, and the optimizer begins anew with it: m = v = 0, and bias correction from the first
    step. After the last layer comes the first again. Use it with Adam or AdamW.

    Use it where not even the gradients of all weights fit in memory. Gradients and optimizer state exist for one layer
    alone, and the backward pass ends at it. A layer that was trained once keeps a copy of its weights beside the base
    model's, so that after one round the adapter is as large as all layers.

    As in the released code, embeddings and the head are frozen; `modules_to_save` trains them all the time. Norms and
    biases inside of the layers are frozen too, where the released code trains them with their layer. It also knows
    other orders: the authors' runs shuffle the layers anew for each round.

    Args:
        **fields: Fields of `DPSConfig` to set otherwise. A `density` takes the place of `units`.
    """
    one = {"score": "in_turn", "units": None if "density" in fields else 1, "stage_steps": 100}
    return DPSConfig(**{**_BLOCKS, **one, **fields})
