"""Noise in the forward passes of training: columns or entries that swap back to the pretrained weight, or none."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

from peft_dps.masking.effective_weight import AmplifiedWeight, EffectiveWeight, NoisyWeight, ShardedAmplifiedWeight
from peft_dps.masking.frozen_policy import FrozenWeight
from peft_dps.masking.mixed_weight import EntryBits, MixedColumns, MixedEntries
from peft_dps.masking.random_bits import counter, takes_part, word
from peft_dps.tensors.layout import Layout, Units
from peft_dps.tensors.registry import Registry
from peft_dps.tensors.saved_state import SavedState, State
from peft_dps.tensors.shards import Sharding

_MOST_STEPS = 1 << 24  # up to which fp32 counts
DECAY_FROM_STEPS = 50  # shorter stages do not count participation finely enough for the decay, in the released code


class NoisedWeight(Protocol):
    """A weight of which noise makes an effective one."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight, or this process's rows of it."""

    @property
    def layout(self) -> Layout:
        """Where its columns are."""

    @property
    def sharding(self) -> Sharding | None:
        """How it is cut over processes."""

    @property
    def noise(self) -> WeightNoise:
        """What noise keeps of it."""

    @property
    def frozen(self) -> FrozenWeight | None:
        """What the mask that holds keeps of it."""

    def whole_base(self) -> torch.Tensor:
        """Return the whole pretrained weight."""

    def whole_dtype(self) -> torch.Tensor:
        """Return a tensor with the device and dtype that a forward sees the weight in."""

    def is_at_snapshot(self) -> bool:
        """Tell whether frozen entries have the bits of the snapshot for sure."""


class Noise:
    """No noise: training forwards compute with the weight itself.

    Attributes:
        substitutes: Whether training forwards compute with something else than the weight.
        amplifies: Whether what they compute with while a mask holds is made from the weight as it was when the mask
            began to hold, in place of noise.

    Args:
        density: Density of the subnetwork.
        seed: Seed of the method's own random numbers.
        decay: See `ColumnNoise`.
    """

    substitutes: ClassVar[bool] = False
    amplifies: ClassVar[bool] = False

    def __init__(self, density: float = 1.0, seed: int = 0, decay: bool | None = None) -> None:
        self.density = density
        self.seed = seed
        self.decay = decay

    def begin(self) -> WeightNoise:
        """Return what is kept of one weight while evidence is gathered."""
        return WeightNoise()

    def units(self, layout: Layout) -> Units | None:
        """Return what takes part, or does not, as a whole; None where nothing tells which entries that are."""
        return layout.entries

    def draw(self, step: int, counts: Sequence[int], device: torch.device) -> tuple[Any, ...]:
        """Draw the noise of a step.

        Args:
            step: Number of the step.
            counts: Number of units of each weight.
            device: Where to make it.

        Returns:
            Per weight, a bool tensor `[units]`, True where one takes part, or what makes it; None for no noise.
        """
        return (None,) * len(counts)

    def noisy(self, weight: NoisedWeight) -> EffectiveWeight | None:
        """Return what a training forward computes with in a step that noise was drawn for; None for the weight."""
        return None

    def amplified(self, weight: NoisedWeight) -> EffectiveWeight | None:
        """Return what a training forward computes with while a mask holds, if it `amplifies`; None for the weight."""
        return None

    def load(self, saved: SavedState, layout: Layout, device: torch.device) -> WeightNoise:
        """Return what a saved state holds of one weight."""
        return self.begin()


class WeightNoise:
    """What is kept of one weight besides: nothing.

    Attributes:
        drawn: Which units take part in the coming step, as `Noise.draw` returns it; None for all.
    """

    drawn: Any = None

    def count_step(self, columns: int, device: torch.device, *, noisy: bool) -> None:
        """Count the columns that took part in a step."""

    def relax_(self, evidence: torch.Tensor, weight: NoisedWeight, stage_steps: int) -> None:
        """Relax evidence by how often each column took part, in place."""

    def state(self) -> State:
        """Return what an exact resume needs."""
        return State()


NOISES: Registry[type[Noise]] = Registry("noise")
NOISES.register("none")(Noise)


@NOISES.register("columns")
class ColumnNoise(Noise):
    """Column noise of DPS Mix (arXiv:2211.01642): with b per input column, 1 with probability `density`,

        W_eff = W0 + b * (W - W0) / density

    while evidence is gathered, and with T the weight when the mask M began to hold

        W_eff = T + M * (W - T) / density

    from then on. A bit depends on the seed, the weight, the step and the column, and on nothing else: it is made by
    integer arithmetic alone, the same on every process, and no other use of random numbers changes it.

    Args:
        density: Probability that a column takes part, in (0, 1).
        seed: Seed of the method's own random numbers.
        decay: Whether evidence is multiplied by exp(-F / stage_steps), F being how often a column took part; None to
            do so in stages of 50 steps or more.
    """  # noqa: D415  # the formulas belong to the sentence

    substitutes = True
    amplifies = True
    mixes: ClassVar[type[NoisyWeight]] = NoisyWeight

    def begin(self) -> WeightNoise:
        """Return what counts how often each column takes part."""
        return Participation(self.decay)

    def units(self, layout: Layout) -> Units | None:
        """Return the columns."""
        return layout.columns

    def draw(self, step: int, counts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Draw the columns of a step; see `Noise.draw`."""
        words = _counters(self.seed, tuple(counts), device) ^ word(f"{self.seed}/step {step}")
        rows: tuple[torch.Tensor, ...] = takes_part(words, self.density).split(list(counts))
        return rows

    def noisy(self, weight: NoisedWeight) -> EffectiveWeight | None:
        """Return W0 + b * (W - W0) / density."""
        drawn, units = weight.noise.drawn, weight.layout.columns
        if drawn is None or units is None:
            return None
        return self.mixes(weight.whole_base(), units.spread(drawn.to(weight.whole_dtype())), self.density)

    def amplified(self, weight: NoisedWeight) -> EffectiveWeight | None:
        """Return T + M * (W - T) / density."""
        frozen = weight.frozen
        if frozen is None or frozen.snapshot is None:
            return None
        if weight.sharding is not None:
            masks = not frozen.holds_bits  # else the gradient is masked once, at the optimizer step
            return ShardedAmplifiedWeight(
                weight.weight, frozen.snapshot, frozen.mask, self.density, weight.sharding, masks
            )
        mask = None if weight.is_at_snapshot() else frozen.mask
        return AmplifiedWeight(frozen.snapshot, self.density, mask)

    def load(self, saved: SavedState, layout: Layout, device: torch.device) -> WeightNoise:
        """Return the participation that a saved state holds."""
        noise = Participation(self.decay)
        if "participation" in saved and layout.columns is not None:
            count = saved.amounts("participation", (layout.columns.count,), torch.float32, at_most=_MOST_STEPS)
            noise.count = count.to(device, copy=True)
        return noise


@NOISES.register("mixout")
class Mixout(ColumnNoise):
    """Mixout (Lee et al., ICLR 2020, arXiv:1909.11299): W_eff = W0 + b * (W - W0) / density, in every step.

    b is 1 with probability `density`, drawn once for each input column, so that a neuron's outgoing weights swap back
    together. The gradient is that of the formula, dL/dW = dL/dW_eff * b / density. Bits are those of `ColumnNoise`.
    """

    amplifies = False
    mixes = MixedColumns

    def begin(self) -> WeightNoise:
        """Return nothing: evidence is not relaxed."""
        return WeightNoise()

    def load(self, saved: SavedState, layout: Layout, device: torch.device) -> WeightNoise:
        """Return nothing, as `begin`."""
        return WeightNoise()


@NOISES.register("mixconnect")
class Mixconnect(Noise):
    """Mixconnect (arXiv:1909.11299): the formula of `Mixout`, with a b of its own for each entry."""

    substitutes = True

    def draw(self, step: int, counts: Sequence[int], device: torch.device) -> tuple[EntryBits, ...]:
        """Return what makes the bits of a step, which are as many as the entries, piece by piece."""
        words = (word(f"{self.seed}/weight {index}") for index in range(len(counts)))
        return tuple(EntryBits(own, word(f"{self.seed}/step {step}"), self.density) for own in words)

    def noisy(self, weight: NoisedWeight) -> EffectiveWeight | None:
        """Return W0 + b * (W - W0) / density."""
        drawn = weight.noise.drawn
        return None if drawn is None else MixedEntries(weight.whole_base(), drawn, self.density)


class Participation(WeightNoise):
    """How often each column of one weight took part in the steps of a phase.

    Args:
        decay: See `ColumnNoise`.

    Attributes:
        count: F, `[columns]`, fp32; None before the first step and after the relaxation.
    """

    def __init__(self, decay: bool | None) -> None:
        self.count: torch.Tensor | None = None
        self._decay = decay

    def count_step(self, columns: int, device: torch.device, *, noisy: bool) -> None:
        """Count the columns that took part; all of them if the weight was read without noise."""
        if self.count is None:
            self.count = torch.zeros(columns, dtype=torch.float32, device=device)
        self.count = self.count.to(device)
        self.count += self.drawn.to(self.count) if noisy and self.drawn is not None else 1.0

    def relax_(self, evidence: torch.Tensor, weight: NoisedWeight, stage_steps: int) -> None:
        """Divide by max(F, 1), and multiply by exp(-F / stage_steps) with decay."""
        units, sharding = weight.layout.columns, weight.sharding
        if self.count is None or units is None:
            return
        first, rows = (0, None) if sharding is None else (sharding.first, sharding.rows)
        times = units.spread(self.count.to(evidence.device), first, rows)
        evidence.div_(times.clamp(min=1))
        if stage_steps >= DECAY_FROM_STEPS if self._decay is None else self._decay:
            evidence.mul_(torch.exp(-times / stage_steps))
        self.count = None  # relaxed once, also if the selection has to be repeated

    def state(self) -> State:
        """Return the participation."""
        return State(whole={} if self.count is None else {"participation": self.count})


@functools.lru_cache(maxsize=8)
def _counters(seed: int, counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Give every unit of every weight a 64-bit word of its own."""
    own = [
        counter(torch.arange(count, dtype=torch.int64, device="cpu"), word(f"{seed}/weight {index}"))
        for index, count in enumerate(counts)
    ]
    return torch.cat(own).to(device)
