"""One training run with the HF Trainer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.arrow_dataset import Dataset
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from peft_dps.compare.data.metrics import measure
from peft_dps.compare.data.task import Task, tokenize
from peft_dps.compare.methods.table import find_method
from peft_dps.compare.runs.dps import score_before_training
from peft_dps.compare.runs.machine import hardware, versions
from peft_dps.compare.runs.memory import PeakMemory
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.pretrained import load_model, load_tokenizer, quieten
from peft_dps.compare.runs.recorder import Recorder, Report, thinned
from peft_dps.compare.runs.retention import retention
from peft_dps.compare.runs.run import Candidate, Run
from peft_dps.compare.settings import Settings

SCORED = 256  # training examples that are scored one by one, by methods that select before training


def train(plan: Plan, title: str, task: Task, model_path: str, candidates: list[Candidate], report: Report) -> Run:
    """Train as planned, and test on every domain of the task if the run is to be reported.

    Args:
        plan: What to train and how.
        title: What tables call the method.
        task: The task, with the training examples that the plan draws.
        model_path: Where the pretrained model is loaded from.
        candidates: The learning rates that were tried before.
        report: Told of every step.

    Returns:
        The finished run.
    """
    quieten()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    tokenizer = load_tokenizer(model_path)
    data = tokenize(task.train, tokenizer, plan.settings.max_length)
    memory = PeakMemory()
    base = load_model(task, model_path, plan.seed, tokenizer, plan.settings.attention)
    method = find_method(plan.method)
    model, config = method.apply(base, plan.options, plan.seed)
    is_test = plan.phase == "test"
    looks = (plan.settings.evaluations if is_test else 1) if len(task.validation) else 0
    recorder = Recorder(task.metrics, looks, report)
    collator = _Collator(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(plan, task, tokenizer, model, data, collator, recorder, folder)
        score_before_training(model, data.select(range(min(SCORED, len(data)))), DataCollatorWithPadding(tokenizer))
        trainer.train()
        peak = memory.peak  # before anything else is held
        pretrained = partial(load_model, task, model_path, plan.seed, tokenizer, plan.settings.attention)
        if method.end(model, pretrained, plan.options) and recorder.looks:
            trainer.evaluate()
        run = Run(
            plan=plan,
            title=title,
            metrics=list(task.metrics),
            validation=recorder.validation,
            evaluations=recorder.evaluations,
            seconds=recorder.seconds,
            started=started,
        )
        if not is_test:
            return run
        run = replace(run, peak_memory=peak, memory_kind=memory.kind, order=collator.fingerprint())
        scores = _test(trainer, task, tokenizer, plan.settings)
        kept = retention(model, task, tokenizer, model_path, plan.settings.max_length)
        run = replace(run, scores=scores, retention=kept, file_size=_saved_size(model, folder))
    run = replace(run, candidates=candidates, config=config, examples=task.sizes)
    return replace(_recorded(run, recorder, model), versions=versions(), hardware=hardware())


class _Trainer(Trainer):
    """Looks at the validation split without touching the random numbers of dropout."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics


class _Collator:
    """Pads batches, and takes the fingerprint of the training examples as they come by."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad = DataCollatorWithPadding(tokenizer)
        self._digest = hashlib.sha256()

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [feature.pop("row", None) for feature in features]
        if rows[0] is not None:
            self._digest.update(repr(rows).encode())
        padded: dict[str, Any] = self._pad(features)
        return padded

    def fingerprint(self) -> str:
        return self._digest.hexdigest()[:16]


def _trainer(
    plan: Plan,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    data: Dataset,
    collator: _Collator,
    recorder: Recorder,
    folder: str,
) -> Trainer:
    trainer = _Trainer(
        model=model,
        args=training_arguments(plan, folder),
        train_dataset=data.add_column("row", list(range(len(data)))),
        eval_dataset=(
            _by_length(tokenize(task.validation, tokenizer, plan.settings.max_length)) if recorder.looks else None
        ),
        data_collator=collator,
        compute_metrics=_metrics(task),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(plan: Plan, folder: str) -> TrainingArguments:
    """Return the Trainer's settings for a run."""
    settings = plan.settings
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=plan.learning_rate,
        weight_decay=settings.weight_decay,
        **_of_this_version(settings),
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        bf16=settings.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # only then does the Trainer take bf16 on a CPU
        seed=plan.seed,
        data_seed=plan.seed,
    )


def _of_this_version(settings: Settings) -> dict[str, Any]:
    """Return what the versions of transformers name differently: warm-up, and batches in random order."""
    if any(field.name == "train_sampling_strategy" for field in fields(TrainingArguments)):
        return {"warmup_steps": settings.warmup, "train_sampling_strategy": "random"}
    return {"warmup_ratio": settings.warmup}  # transformers 4, whose batches are in random order unless grouped


def _recorded(run: Run, recorder: Recorder, model: nn.Module) -> Run:
    """Add what a report shows of the course of the training and of DPS."""
    losses, loss_steps = thinned(recorder.losses)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run = replace(run, losses=losses, loss_steps=loss_steps, trainable=trainable)
    status = recorder.status
    if status is None:
        return run
    of_all = None if run.config.get("storage") == "compact" else status.selected  # what is compact has nothing frozen
    return replace(
        run,
        selections=recorder.selections,
        fractions=recorder.fractions,
        status=str(status),
        frozen_moved=status.frozen_moved,
        selected=None if of_all is None else trainable - status.entries + of_all,
    )


def _metrics(task: Task, merged: tuple[int, ...] | None = None) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if task.is_regression:
            return measure(task.metrics, np.squeeze(outputs, axis=-1), np.asarray(prediction.label_ids))
        classes = np.argmax(outputs, axis=-1)
        classes = classes if merged is None else np.asarray(merged)[classes]
        return measure(task.metrics, classes, np.asarray(prediction.label_ids))

    return compute


def _test(
    trainer: Trainer, task: Task, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, dict[str, float]]:
    scores = {}
    for name, examples in task.tests.items():
        trainer.compute_metrics = None  # by default it would know nothing of merged classes
        data: Any = _by_length(tokenize(examples, tokenizer, settings.max_length))
        prediction: Any = trainer.predict(data)
        compute = _metrics(task, task.merged.get(name))
        scores[name] = compute(EvalPrediction(prediction.predictions, prediction.label_ids))
    return scores


def _by_length(data: Dataset) -> Dataset:
    lengths = [len(ids) for ids in data["input_ids"]]
    sorted_data: Dataset = data.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return sorted_data


def _saved_size(model: nn.Module, folder: str) -> int:
    """Size of the weights that have to be kept: of a model trained in part, that part."""
    save_pretrained: Any = model.save_pretrained  # of a PreTrainedModel and of a PeftModel alike
    if isinstance(model, PreTrainedModel):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = model.state_dict()
        part = {name: tensor for name, tensor in state.items() if name in trained}
        save_pretrained(folder, state_dict=part if len(trained) < len(list(model.parameters())) else None)
    else:
        save_pretrained(folder)
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
