"""Scores: what is known of a weight -> how important each entry is, higher is better.

A score is one function, called when the subnetwork is selected. `SCORES.register`, or `register_score`, gives it a
name that `DPSConfig(score=...)` accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peft_dps.errors import ConfigError
from peft_dps.tensors.registry import Registry
from peft_dps.tensors.shards import Sharding


@dataclass(frozen=True)
class ScoreContext:
    """What a score may look at, for one weight.

    Attributes:
        gathered: The evidence of this phase, shape of the weight: for "squared_gradient" the sum of the squared
            gradients, in `score_dtype` (by default fp32, or fp64 for an fp64 weight), relaxed by participation in Mix.
            In compact storage its sums over units. None if the score was registered with `evidence="none"`.
        weight: The weight as trained so far, in the adapter's dtype.
        load_base: Returns the pretrained weight, same shape, in the base model's dtype.
        generator: Random numbers of this weight and selection, on the CPU: the same on every process.
        sharding: How FSDP2 has cut the weight over processes, and all of the above is this process's rows of it; None
            where it is whole.
        selection: Number of the selection, from 1: that of the cycle.
        place: Which of the weights it is, or of the blocks that weights are in, from 0, in the order of the modules.
        places: Number of these.
    """

    gathered: torch.Tensor | None
    weight: torch.Tensor
    load_base: Callable[[], torch.Tensor]
    generator: torch.Generator
    sharding: Sharding | None = None
    selection: int = 1
    place: int = 0
    places: int = 1

    @property
    def base_weight(self) -> torch.Tensor:
        """The pretrained weight; with `offload_base` each look at it reads it from its file."""
        return self.load_base()

    @property
    def whole_base(self) -> torch.Tensor:
        """The pretrained weight with the rows of all processes, which all have to ask for it."""
        return self.base_weight if self.sharding is None else self.sharding.whole_of(self.base_weight)

    @property
    def evidence(self) -> torch.Tensor:
        """The evidence of this phase."""
        if self.gathered is None:
            raise ConfigError("The score looks at evidence, and none is gathered for it. Set `evidence`.")
        return self.gathered

    def random(self) -> torch.Tensor:
        """Draw a number in [0, 1) for each entry, fp32: those of the whole weight, cut to the rows that are here."""
        sharding = self.sharding
        shape = self.weight.shape if sharding is None else sharding.shape
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        if sharding is not None:
            drawn = sharding.part_of(drawn).clone()  # so that the whole can be freed
        return drawn.to(self.weight.device)


ScoreFunction = Callable[[ScoreContext], torch.Tensor]
SCORES: Registry[ScoreFunction] = Registry("score")
_EVIDENCE: dict[str, str] = {}  # what each score is made from, unless a configuration says otherwise
_PER_UNIT: set[str] = set()  # those that need no more of a unit than what the evidence of its entries adds up to


def register_score(
    name: str, *, evidence: str = "squared_gradient", per_unit: bool = False
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a function as the score that `DPSConfig(score=name)` selects by.

    Args:
        name: The name, not taken yet. The same function may be registered again, as reloading its module does.
        evidence: What is gathered for it, by its name; "none" saves the memory and time of gathering.
        per_unit: Whether it needs no more of a unit than the sum of its entries' evidence, and looks at no weight.
            Compact storage, which keeps no other evidence, can then use it. A score without evidence does not need it.

    Returns:
        A decorator that returns its function unchanged.

    Raises:
        ConfigError: If the name is empty or taken by another function, or the score is no function.
    """
    add = SCORES.register(name)

    def register(function: ScoreFunction) -> ScoreFunction:
        add(function)
        _EVIDENCE[name] = evidence
        (_PER_UNIT.add if per_unit else _PER_UNIT.discard)(name)
        return function

    return register


def evidence_of(score: str) -> str:
    """Return the name of the evidence that a score is made from."""
    SCORES.find(score)
    return _EVIDENCE.get(score, "squared_gradient")


def is_per_unit(score: str) -> bool:
    """Tell whether a score needs no more of a unit than the sum of its entries' evidence."""
    return score in _PER_UNIT


@register_score("squared_gradient", per_unit=True)
def squared_gradient(context: ScoreContext) -> torch.Tensor:
    """Score by the accumulated squared gradient: S = sum over the stage of G * G (arXiv:2211.01642)."""
    return context.evidence


@register_score("absolute_gradient", evidence="absolute_gradient", per_unit=True)
def absolute_gradient(context: ScoreContext) -> torch.Tensor:
    """Score by the accumulated absolute gradient: S = sum over the stage of abs(G), as SIFT (arXiv:2312.11875)."""
    return context.evidence


@register_score("random", evidence="none", per_unit=True)
def random(context: ScoreContext) -> torch.Tensor:
    """Score at random: the baseline that a score from gradients has to beat at the same density."""
    return context.random()


@register_score("magnitude", evidence="none")
def magnitude(context: ScoreContext) -> torch.Tensor:
    """Score by the size of the pretrained weight: abs(W0)."""
    return _widened(context.base_weight).abs().to(context.weight.device)


@dataclass(frozen=True)
class LowRankResidual:
    """Score by what no matrix of a low rank can hold of the pretrained weight: abs(W0 - its best approximation).

    DSEE (arXiv:2111.00160) trains the entries where the sparse part S of W0 = U V + S is largest, and finds U, V and S
    together by greedy steps (GreBsmo). Here U V is the truncated singular value decomposition, the best of its rank,
    and S all that it leaves. Weights of more than two axes are taken as `[first, others]`.

    Args:
        rank: Rank of U V. Register another one with
            `register_score("low_rank_residual_4", evidence="none")(LowRankResidual(4))`.
    """

    rank: int = 16

    def __call__(self, context: ScoreContext) -> torch.Tensor:
        """Return the scores."""
        weight = _widened(context.whole_base.to(context.weight.device))
        matrix = weight.reshape(weight.shape[0], -1)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        left = (matrix - u[:, : self.rank] * s[: self.rank] @ v[: self.rank]).view(weight.shape).abs()
        return left if context.sharding is None else context.sharding.part_of(left)


register_score("low_rank_residual", evidence="none")(LowRankResidual())


def _widened(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@register_score("in_turn", evidence="none", per_unit=True)
def in_turn(context: ScoreContext) -> torch.Tensor:
    """Score weights or blocks by how soon it is their turn: in ascending order, another at each selection.

    That is the order of BAdam (arXiv:2404.02827). With several `units` the next ones are selected too, so that each
    one stays for as many selections. The `reduction` has to be "mean", as it is by default.
    """
    before = (context.place - (context.selection - 1)) % context.places
    return torch.full_like(context.weight, context.places - before, dtype=torch.float32)


@register_score("movement", evidence="none")
def movement(context: ScoreContext) -> torch.Tensor:
    """Score by how far training has moved an entry: abs(W - W0), as LT-SFT (arXiv:2110.07560)."""
    weight = _widened(context.weight)
    return (weight - context.base_weight.to(weight)).abs()


def check_scores(scores: Any, weight: torch.Tensor, *, score: str, name: str) -> None:
    """Check what a score returned, which may be anything if a user has registered it."""
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        found = f"dtype {scores.dtype}" if isinstance(scores, torch.Tensor) else f"{type(scores).__name__}"
        raise ConfigError(
            f"The score {score!r} returned {found} for the weight of {name!r}; it must be a tensor of floats."
        )
    if (scores.shape, scores.device) != (weight.shape, weight.device):
        raise ConfigError(
            f"The score {score!r} returned shape {tuple(scores.shape)} on {scores.device} for the weight of {name!r}; "
            f"it must be {tuple(weight.shape)} on {weight.device}, as the weight."
        )
