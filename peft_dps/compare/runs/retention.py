"""What a model could do before training and can still do: the probes of a task, asked of its backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_dps.compare.data.task import Task
from peft_dps.compare.runs.comparison import Comparison
from peft_dps.compare.runs.observer import Observer
from peft_dps.compare.runs.pretrained import load_model, load_tokenizer, quieten
from peft_dps.compare.runs.processes import Processes, WorkError, slots
from peft_dps.compare.runs.recorder import Report
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Retention


def measure_pretrained(task: Task, model_path: str, max_length: int, report: Report) -> dict[str, float]:
    """Measure every probe of a task on the pretrained model.

    Args:
        task: The task.
        model_path: Where the pretrained model is loaded from.
        max_length: Longest sequence, in tokens.
        report: Not told of anything.

    Returns:
        Per name of a probe, what was measured.
    """
    quieten()
    tokenizer = load_tokenizer(model_path)
    return _measure(load_model(task, model_path, 0, tokenizer), task, tokenizer, model_path, max_length)


def asked_before(
    comparison: Comparison, model_path: str, results: Results, processes: Processes, observer: Observer, task: Task
) -> Task:
    """Return a task with what its probes measure on the pretrained model, as earlier runs have it or as it is now.

    Args:
        comparison: The comparison.
        model_path: Where its model is loaded from.
        results: What its result file holds.
        processes: Makes the process that measures.
        observer: Told that it is done.
        task: The task.

    Raises:
        ValueError: A probe cannot be measured.
    """
    asked = {probe.name: probe.fingerprint() for probe in task.probes}
    if not asked:
        return task
    wanted = (comparison.model, comparison.settings.max_length, asked)
    for run in results.runs.values():
        if run.retention and wanted == (run.plan.model, run.plan.settings.max_length, run.plan.probes):
            return replace(task, pretrained={each.probe: each.before for each in run.retention})
    observer.say(f"Measuring {', '.join(asked)} before training ...")
    arguments = (task, model_path, comparison.settings.max_length)
    try:
        return replace(task, pretrained=processes.run(measure_pretrained, arguments, slots(1)[0]))
    except WorkError as error:
        raise ValueError(f"`probes` cannot be measured on the model {comparison.model!r}: {error}") from error


def retention(
    model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int
) -> list[Retention]:
    """Measure every probe of a task on a trained model, beside what was measured on the pretrained one."""
    after = _measure(model, task, tokenizer, model_path, max_length)
    return [Retention(each.name, each.metric, task.pretrained[each.name], after[each.name]) for each in task.probes]


def _measure(
    model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, model_path: str, max_length: int
) -> dict[str, float]:
    backbone = backbone_of(model)
    backbone.eval()
    return {each.name: each.measure(backbone, tokenizer, model_path, max_length) for each in task.probes}


def backbone_of(model: Any) -> nn.Module:
    """Return a model without its head, with adapters in its layers; of an encoder and a decoder the encoder.

    Prompts and prefixes, which some of PEFT's methods put before a text, are no part of it.

    Args:
        model: A model with a head, or a PEFT model around one.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone: Any = base.base_model
    found: nn.Module = backbone.get_encoder() if base.config.is_encoder_decoder else backbone
    return found
