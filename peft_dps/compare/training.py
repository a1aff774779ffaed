"""One training run with the HF Trainer, in a process of its own so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from peft_dps.compare.demo_run import Run, Settings
from peft_dps.compare.memory import peak_resident
from peft_dps.compare.methods import METHODS
from peft_dps.compare.task import Task, tokenize
from peft_dps.adapters import find_subnetworks
from peft_dps.schedule import Stage
from peft_dps.status import DPSStatus, status_of

PACKAGES = ("peft", "torch", "transformers", "accelerate")


def train_apart(method: str, task: Task, settings: Settings) -> Run:
    """Train one method in a fresh process, and test it on every domain of the task.

    Args:
        method: Name of a registered method.
        task: What to train and test on.
        settings: How to train.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(train, method, task, settings).result()


def train(method: str, task: Task, settings: Settings) -> Run:
    """Train one method in this process, and test it on every domain of the task.

    Args:
        method: Name of a registered method.
        task: What to train and test on.
        settings: How to train.
    """
    quieten()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    data = tokenize(task.train, tokenizer, settings.max_length)
    memory_before = psutil.Process().memory_info().rss
    model = METHODS[method].prepare(load_model(task, settings))
    witness = _Witness()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(settings, folder),
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_correlation if task.is_regression else _accuracy,
            callbacks=[_ProgressBar(METHODS[method].title), witness],
        )
        trainer.remove_callback(PrinterCallback)
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
        peak_memory = peak_resident() - memory_before
        _save(model, folder)
        file_size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        scores = _test(trainer, task, tokenizer, settings)
    log: list[dict[str, Any]] = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        method=method,
        settings=settings,
        scores=scores,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        peak_memory=peak_memory,
        file_size=file_size,
        seconds=seconds,
        losses=[entry["loss"] for entry in log],
        stages=[entry["dps_stage"] for entry in log if "dps_stage" in entry],
        versions={"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}},
        **_proof(witness.status),
    )


def load_model(task: Task, settings: Settings) -> PreTrainedModel:
    """Load the pretrained model with a new head for the task; the same seed gives the same head."""
    set_seed(settings.seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=task.num_labels, problem_type="regression" if task.is_regression else None
    )
    return model


def quieten() -> None:
    """Keep the libraries' progress bars and notices out of ours."""
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|datasets)\.")


def _arguments(settings: Settings, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=0.1,
        train_sampling_strategy="random",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings.seed,
    )


def _test(trainer: Trainer, task: Task, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> dict[str, float]:
    scores = {}
    for name, examples in task.tests.items():
        by_length = tokenize(examples, tokenizer, settings.max_length)
        lengths = [len(ids) for ids in by_length["input_ids"]]
        by_length = by_length.select(sorted(range(len(lengths)), key=lengths.__getitem__))
        scores[name] = float(trainer.evaluate(by_length)["eval_score"])
    return scores


def _save(model: torch.nn.Module, folder: str) -> None:
    save_pretrained: Any = model.save_pretrained  # of a PreTrainedModel and of a PeftModel alike
    save_pretrained(folder)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"score": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def _correlation(prediction: EvalPrediction) -> dict[str, float]:
    return {"score": float(np.corrcoef(np.squeeze(prediction.predictions), prediction.label_ids)[0, 1])}


def _proof(status: DPSStatus | None) -> dict[str, Any]:
    if status is None:
        return {}
    selected = {
        name: layer.selected / layer.entries for name, layer in status.layers.items() if layer.selected is not None
    }
    return {"selected": selected, "status": str(status), "frozen_moved": status.frozen_moved}


class _Witness(TrainerCallback):
    """Keeps what DPS says of itself at the end of each SUBNETWORK stage."""

    def __init__(self) -> None:
        self.status: DPSStatus | None = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        for subnetwork in find_subnetworks(kwargs["model"]).values():
            position, schedule = subnetwork.position, subnetwork.schedule
            if position is None or schedule is None or position.stage is not Stage.SUBNETWORK:
                continue
            if schedule.stage_steps == position.step_in_stage or state.global_step == state.max_steps:
                self.status = status_of(subnetwork)


class _ProgressBar(TrainerCallback):
    """Shows steps, stage, loss and time left."""

    def __init__(self, title: str) -> None:
        columns = TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps")
        self.bar = Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True)
        )
        self.task = self.bar.add_task(title, total=None, note="")

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            stage = f", {logs['dps_stage']}" if "dps_stage" in logs else ""
            self.bar.update(self.task, note=f"loss {float(logs['loss']):.2f}{stage}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
