"""Step times of methods side by side: one step of each in turn, in one process, so that noise hits all alike."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.optim import AdamW
from transformers import AutoTokenizer, DataCollatorWithPadding

from peft_dps.compare.demo_run import Settings
from peft_dps.compare.methods import METHODS
from peft_dps.compare.task import Task, tokenize
from peft_dps.compare.training import load_model, quieten
from peft_dps.adapters import find_subnetworks

WARM_UP = 2


def step_time_ratios(methods: list[str], task: Task, settings: Settings, steps: int = 16) -> dict[str, float]:
    """Measure the time of a training step of each method, relative to the first.

    Args:
        methods: Names of registered methods; the first is the reference.
        task: Where the batch comes from.
        settings: How to train.
        steps: Timed steps of each method; half of DPS's are in each stage.

    Returns:
        Per method, the median over the steps of its time divided by that of the reference in the same round.
    """
    quieten()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    data = tokenize(task.train, tokenizer, settings.max_length)
    batch = DataCollatorWithPadding(tokenizer)([data[index] for index in range(settings.batch_size)])
    steppers = [_Stepper(METHODS[name].prepare(load_model(task, settings)), steps) for name in methods]
    times: list[list[float]] = [[] for _ in methods]
    for _ in range(WARM_UP + steps):
        for stepper, measured in zip(steppers, times, strict=True):
            measured.append(stepper.step(batch))
    reference = times[0][WARM_UP:]
    return {
        name: statistics.median(own / first for own, first in zip(measured[WARM_UP:], reference, strict=True))
        for name, measured in zip(methods, times, strict=True)
    }


class _Stepper:
    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model.train()
        for subnetwork in find_subnetworks(model).values():
            # One switch, in the middle of the timed steps.
            subnetwork.config.stage_steps = WARM_UP + steps // 2
            subnetwork.restart(None)
        self.optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start
