"""Gradients -> scores: how important an entry is, higher is better.

A score is one function of what is known about a weight when the subnetwork is selected. `register_score` gives it a
name that `DPSConfig(score=...)` accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from peft_dps.errors import ConfigError

SCORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by what `DPSConfig.score_dtype` calls them
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 24


@dataclass(frozen=True)
class Evidence:
    """What a score may look at, for one weight.

    Attributes:
        squared_gradients: Sum over the stage of the squared gradients, shape of the weight, in `score_dtype` (by
            default fp32, or fp64 for an fp64 weight), relaxed by participation in Mix; None if the score was
            registered with `uses_gradients=False`.
        weight: The weight as trained so far, in the adapter's dtype.
        load_base: Returns the pretrained weight, same shape, in the base model's dtype.
        generator: Random numbers of this weight and cycle, on the CPU: the same on every process.
        whole_shape: Shape of the whole weight, where FSDP2 has cut it over processes and all of the above is this
            process's rows of it; None where it is whole.
        first_row: The first of those rows.
    """

    squared_gradients: torch.Tensor | None
    weight: torch.Tensor
    load_base: Callable[[], torch.Tensor]
    generator: torch.Generator
    whole_shape: torch.Size | None = None
    first_row: int = 0

    @property
    def base_weight(self) -> torch.Tensor:
        """The pretrained weight; with `offload_base` each look at it reads it from its file."""
        return self.load_base()

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Cut a tensor with as many rows as the whole weight to the rows that are here."""
        if self.whole_shape is None:
            return whole
        return whole.narrow(0, self.first_row, self.weight.shape[0]).clone()  # so that the whole can be freed


ScoreFunction = Callable[[Evidence], torch.Tensor]


@dataclass(frozen=True)
class Score:
    """A named score.

    Attributes:
        name: What `DPSConfig.score` calls it.
        function: Maps the evidence to scores of the weight's shape, none of them NaN or negative.
        uses_gradients: Whether squared gradients have to be accumulated for it.
    """

    name: str
    function: ScoreFunction
    uses_gradients: bool = True


SCORES: dict[str, Score] = {}


def register_score(name: str, *, uses_gradients: bool = True) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a function as the score that `DPSConfig(score=name)` selects by.

    Args:
        name: The name, not taken yet. The same function may be registered again, as reloading its module does.
        uses_gradients: False if the score needs no gradients; nothing is accumulated then, which saves memory.

    Returns:
        A decorator that returns its function unchanged.

    Raises:
        ConfigError: If the name is taken by another function.
    """

    def register(function: ScoreFunction) -> ScoreFunction:
        taken = SCORES.get(name)
        if taken is not None and _path(taken.function) != _path(function):
            raise ConfigError(f"The score name {name!r} is taken by {_path(taken.function)}; use another name.")
        SCORES[name] = Score(name, function, uses_gradients)
        return function

    return register


def find_score(name: str) -> Score:
    """Return the score of a name.

    Raises:
        ConfigError: If no score is registered under it.
    """
    if name not in SCORES:
        known = ", ".join(map(repr, SCORES))
        raise ConfigError(f"`score` must be one of {known}, got {name!r}. Give your own with `register_score`.")
    return SCORES[name]


def _path(function: ScoreFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@register_score("squared_gradient")
def squared_gradient(evidence: Evidence) -> torch.Tensor:
    """Score by the accumulated squared gradient: S = sum over the stage of G * G (arXiv:2211.01642)."""
    if evidence.squared_gradients is None:
        raise ConfigError("The score 'squared_gradient' needs accumulated gradients, and none were kept for it.")
    return evidence.squared_gradients


@register_score("random", uses_gradients=False)
def random(evidence: Evidence) -> torch.Tensor:
    """Score at random: the baseline that a score from gradients has to beat at the same density."""
    shape = evidence.weight.shape if evidence.whole_shape is None else evidence.whole_shape
    scores = torch.rand(shape, generator=evidence.generator, dtype=torch.float32)
    return evidence.part_of(scores).to(evidence.weight.device)


def score_dtype(weight: torch.Tensor, choice: str = "float32") -> torch.dtype:
    """Return the dtype in which scores of a weight are accumulated.

    Args:
        weight: The weight.
        choice: `DPSConfig.score_dtype`; "float32" means fp64 for an fp64 weight.
    """
    dtype = SCORE_DTYPES[choice]
    return torch.promote_types(weight.dtype, dtype) if dtype is torch.float32 else dtype


@torch.no_grad()
def are_finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Tell whether gradients are finite, and so small that the sum of their squares is.

    Args:
        gradients: At least one, any floating dtypes, on any devices.
    """
    wide = torch.float64 if any(gradient.dtype is torch.float64 for gradient in gradients) else torch.float32
    if all(each.device.type == "cpu" and each.is_contiguous() and each.element_size() >= 4 for each in gradients):
        flat = (gradient.view(-1) for gradient in gradients)  # a dot product reads at twice the speed of a norm
        sizes = [torch.dot(each, each).to(wide) for each in flat]
    else:
        norms = torch._foreach_norm(list(gradients), 2, dtype=wide)
        sizes = [norm.to(gradients[0].device) for norm in norms]
    return bool(torch.stack(sizes).isfinite().all())


@torch.no_grad()
def accumulate_squares_(totals: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], scale: float = 1.0) -> None:
    """Add the squared gradients to the totals in place: S += (G / scale)^2.

    Args:
        totals: Scores so far, one per weight, in the dtype of `score_dtype`. Bf16 sums are added to in fp32, and
            rounded once.
        gradients: Gradients the optimizer is about to apply, same shapes, any floating dtype.
        scale: Factor that a gradient scaler has left in the gradients.
    """
    factor = scale**-2
    if all(gradient.dtype == total.dtype for total, gradient in zip(totals, gradients, strict=True)):
        torch._foreach_addcmul_(list(totals), list(gradients), list(gradients), value=factor)
        return
    for total, gradient in zip(totals, gradients, strict=True):
        if total.dtype is torch.bfloat16:
            for part, piece in _pieces(total, gradient):
                wide = piece.to(torch.float32)
                part.copy_(part.to(torch.float32).addcmul_(wide, wide, value=factor))
        else:  # one wider copy at a time
            wide = gradient.to(total.dtype)
            total.addcmul_(wide, wide, value=factor)


def _pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Cut tensors of the same shape into pieces whose wider copies stay in the cache, where their layout allows it."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    chunk = _CPU_CHUNK if tensors[0].device.type == "cpu" else _DEVICE_CHUNK
    return zip(*(tensor.view(-1).split(chunk) for tensor in tensors), strict=True)


@torch.no_grad()
def relax_by_participation_(
    total: torch.Tensor, participation: torch.Tensor, stage_steps: int, *, decay: bool
) -> torch.Tensor:
    """Relax scores of DPS Mix by how often their column took part: s = S / max(F, 1), times exp(-F / us) with decay.

    Args:
        total: S, the accumulated squared gradients; changed in place.
        participation: F, steps of the stage in which the column took part, shaped to broadcast over `total`.
        stage_steps: us, the length of the stage in steps.
        decay: Whether to favour columns that took part less often.

    Returns:
        `total`.
    """
    total.div_(participation.clamp(min=1))
    if decay:
        total.mul_(torch.exp(-participation / stage_steps))
    return total
