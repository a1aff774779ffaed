"""Step times of methods side by side: one step of each in turn, in one process, so that noise hits all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer

from peft_dps.compare.data.task import Task, tokenize
from peft_dps.compare.methods.table import find_method
from peft_dps.compare.runs.machine import hardware, synchronize, versions
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.pretrained import load_model, load_tokenizer, quieten
from peft_dps.compare.runs.recorder import Report
from peft_dps.compare.runs.run import Timing
from peft_dps.compare.runs.training import training_arguments

WARM_UP = 2


def time_steps(plans: Sequence[Plan], task: Task, model_path: str, steps: int, report: Report) -> Timing:
    """Measure the time of a training step of each method.

    Args:
        plans: A plan of each method, of the same task and budget.
        task: Where the batch comes from.
        model_path: Where the pretrained model is loaded from.
        steps: Timed steps of each method; half of DPS's are in each stage. What selects once has done so before.
        report: Told of every round.
    """
    quieten()
    plan, started = plans[0], time.perf_counter()
    tokenizer = load_tokenizer(model_path)
    data = tokenize(task.train, tokenizer, plan.settings.max_length)
    size = min(plan.settings.batch_size, len(data))
    batch = DataCollatorWithPadding(tokenizer)([data[index] for index in range(size)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    tokenized, steppers = time.perf_counter(), {}
    for each in plans:
        base = load_model(task, model_path, plan.seed, tokenizer, plan.settings.attention)
        switch = WARM_UP + steps // 2  # of stages: one, in the middle of the timed steps
        model, _ = find_method(each.method).apply(base, each.options, stage_steps=switch, score_steps=WARM_UP)
        steppers[each.variant] = _Stepper(model, device, each)
    loading = tokenized - started + (time.perf_counter() - tokenized) / len(plans)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(WARM_UP + steps):
        for name, stepper in steppers.items():
            taken = stepper.step(batch)
            if number >= WARM_UP:
                seconds[name].append(round(taken, 6))
        report(number + 1, WARM_UP + steps, "")
    return Timing(
        model=plan.model,
        task=plan.task,
        batch_size=size,
        tokens=int(batch["input_ids"].shape[1]),
        seconds=seconds,
        precision=plan.settings.precision,
        attention=plan.settings.attention,
        max_length=plan.settings.max_length,
        versions=versions(),
        hardware=hardware(),
        loading=round(loading, 3),
    )


class _Stepper:
    """Makes the steps that the Trainer makes: with its optimizer, and its clipping."""

    def __init__(self, model: nn.Module, device: str, plan: Plan) -> None:
        arguments = training_arguments(plan, "")
        make, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        self.model = model.to(device).train()
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=plan.settings.precision == "bf16")
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make(self.trained, **{**settings, "lr": 1e-5})
        self.most = arguments.max_grad_norm

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.most)
        self.optimizer.step()
        synchronize()
        return time.perf_counter() - start
