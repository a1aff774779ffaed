"""A variant at work: it trains one step whenever it is told to, and reports what that took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.memory import tensor_bytes
from benchmarks.models import make_batch
from benchmarks.settings import OPTIMIZERS, Settings
from benchmarks.variant import VARIANTS
from peft_dps.compare.runs.dps import status_of
from peft_dps.compare.runs.memory import peak_resident, resident


@dataclass(frozen=True)
class StepTimes:
    """What one step took.

    Attributes:
        passes: Seconds of dropping the gradients, forward and backward.
        update: Seconds of `optimizer.step()`, in which DPS scores, selects and freezes.
        cpu: Processor seconds of the whole step, over all threads.
        peak_rss: Most bytes in memory since the process began.
    """

    passes: float
    update: float
    cpu: float
    peak_rss: int

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.passes + self.update


@dataclass(frozen=True)
class Summary:
    """What a variant knows at the end.

    Attributes:
        trained_entries: Entries of all trained parameters.
        selected_fraction: Fraction of the targeted entries in the last subnetwork; None without DPS.
        frozen_moved: Whether a frozen entry moved in the last stage; None without DPS.
        rss_before: Bytes in memory before the model was built.
        peak_rss: Most bytes in memory.
        tensors: Per stage, at its last step, the bytes of the live tensors by kind.
    """

    trained_entries: int
    selected_fraction: float | None
    frozen_moved: bool | None
    rss_before: int
    peak_rss: int
    tensors: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak_above(self) -> int:
        """Peak memory above the state before the model was built."""
        return self.peak_rss - self.rss_before


class Trainee:
    """One variant's model, batch and optimizer.

    Args:
        name: Name of the variant.
        settings: Settings of the run.
        wrap: What makes the model ready for several processes, all of which train on this batch.
    """

    def __init__(
        self, name: str, settings: Settings, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    ) -> None:
        self.device = settings.device
        self.batch = make_batch(settings)
        self.rss_before = resident()
        self.model: nn.Module = wrap(VARIANTS[name].build(settings))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.trained, settings)
        self.tensors: dict[str, dict[str, int]] = {}

    def step(self, stage: str, between: Callable[[], None] = lambda: None) -> StepTimes:
        """Train one step and take its time.

        Args:
            stage: Name of the stage that the step lies in.
            between: Called between forward and backward.
        """
        synchronize(self.device)
        cpu, start = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(**self.batch).loss
        between()
        loss.backward()
        synchronize(self.device)
        middle = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        end = time.perf_counter()
        times = StepTimes(middle - start, end - middle, time.process_time() - cpu, peak_resident())
        self.tensors[stage] = tensor_bytes(self.model, self.optimizer)
        return times

    def finish(self) -> Summary:
        """Return what is known at the end."""
        peak = peak_resident()  # first, since looking for moved entries takes memory
        status = status_of(self.model)
        return Summary(
            trained_entries=sum(parameter.numel() for parameter in self.trained),
            selected_fraction=None if status is None else status.selected_fraction,
            frozen_moved=None if status is None else status.frozen_moved,
            rss_before=self.rss_before,
            peak_rss=peak,
            tensors=self.tensors,
        )


def make_optimizer(trained: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer of the settings."""
    return torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.01, **OPTIMIZERS[settings.optimizer])


def synchronize(device: str) -> None:
    """Wait until an accelerator has done all that it was told to."""
    if device == "cuda":
        torch.cuda.synchronize()


def quieten() -> None:
    """Silence what PEFT brings about: it asks transformers for the old name of a property."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def set_up(settings: Settings) -> None:
    """Prepare a process for computing on the threads of the settings."""
    quieten()
    disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
