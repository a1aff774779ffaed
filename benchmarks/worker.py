"""A variant at work in a process of its own: it trains one step whenever it is told to, and reports what that took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from torch import nn

from benchmarks.memory import rss, tensor_bytes
from benchmarks.settings import OPTIMIZERS, Settings
from benchmarks.variant import VARIANTS, bert_config
from peft_dps.adapters import find_subnetworks
from peft_dps.compare.memory import peak_resident
from peft_dps.status import status_of

STEP, FINISH = "step", "finish"


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
        config = bert_config(settings)
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (settings.batch, settings.tokens)
        self.batch = {
            "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.randint(2, (settings.batch,), generator=generator),
        }
        self.rss_before = rss()
        self.model: nn.Module = wrap(VARIANTS[name].build(settings))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, weight_decay=0.01, **OPTIMIZERS[settings.optimizer])
        self.tensors: dict[str, dict[str, int]] = {}

    def step(self, stage: str) -> StepTimes:
        """Train one step and take its time.

        Args:
            stage: Name of the stage that the step lies in.
        """
        cpu, start = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        self.model(**self.batch).loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        times = StepTimes(middle - start, end - middle, time.process_time() - cpu, peak_resident())
        self.tensors[stage] = tensor_bytes(self.model, self.optimizer)
        return times

    def finish(self) -> Summary:
        """Return what is known at the end."""
        peak = peak_resident()  # first, since looking for moved entries takes memory
        status = next((status_of(subnetwork) for subnetwork in find_subnetworks(self.model).values()), None)
        return Summary(
            trained_entries=sum(parameter.numel() for parameter in self.trained),
            selected_fraction=None if status is None else status.selected_fraction,
            frozen_moved=None if status is None else status.frozen_moved,
            rss_before=self.rss_before,
            peak_rss=peak,
            tensors=self.tensors,
        )


def quieten() -> None:
    """Silence what PEFT brings about: it asks transformers for the old name of a property."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def work(connection: Connection, name: str, settings: Settings) -> None:
    """Serve the requests of the other end: (STEP, stage) or (FINISH, "").

    Args:
        connection: Where requests come from and answers go.
        name: Name of the variant.
        settings: Settings of the run.
    """
    quieten()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trainee = Trainee(name, settings)
    connection.send(torch.get_num_threads())
    with suppress(EOFError, BrokenPipeError):  # the other end is gone
        while (request := connection.recv())[0] == STEP:
            connection.send(trainee.step(request[1]))
        connection.send(trainee.finish())
