from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForSequenceClassification

from peft_dps.compare.data.examples import Examples
from peft_dps.compare.data.probe import Probe
from peft_dps.compare.data.task import build_task
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.pretrained import load_tokenizer
from peft_dps.compare.runs.retention import backbone_of, measure_pretrained, retention
from peft_dps.compare.runs.run import from_json, to_json
from peft_dps.compare.runs.training import train
from peft_dps.compare.settings import Settings

SETTINGS = Settings(epochs=1, batch_size=8, max_length=16, validation_size=8, evaluations=2)


@pytest.fixture
def task(examples):
    texts = examples(12, "pairs").texts
    pairs = Examples("pairs", texts, tuple(map(float, range(12))), texts, (), (*texts[1:], texts[0]))
    task = build_task("mine", examples(), {"here": examples(18)}, SETTINGS)
    return replace(task, probes=(Probe("pairs", pairs),), pretrained={"pairs": 0.5})


@pytest.fixture
def run(task, model_folder):
    def run(method="full", task=task, **fields):
        plan = Plan(method, 1e-2, task.name, 0, "tiny", settings=SETTINGS, **fields)
        return train(plan, method, task, str(model_folder), [], lambda *content: None)

    return run


def test_probes_are_measured_after_training_and_leave_it_alone(run, task):
    record, plain = run(), run(task=replace(task, probes=()))
    (kept,) = record.retention
    assert (kept.probe, kept.metric, kept.before) == ("pairs", "spearman", 0.5)
    assert -1 <= kept.after <= 1
    assert (record.losses, record.scores) == (plain.losses, plain.scores)
    assert plain.retention == []
    assert run(phase="tune").retention == []
    assert from_json(to_json(record)).retention == record.retention


def test_a_model_that_was_not_trained_keeps_all(task, model_folder, tiny_bert):
    before = measure_pretrained(task, str(model_folder), 16, lambda *content: None)
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["intermediate.dense"]))
    known = replace(task, pretrained=before)
    (kept,) = retention(adapted, known, load_tokenizer(str(model_folder)), str(model_folder), 16)
    assert kept.after == pytest.approx(kept.before)
    with torch.no_grad():
        adapted.get_base_model().bert.encoder.layer[0].intermediate.dense.lora_B["default"].weight.normal_()
    (changed,) = retention(adapted, known, load_tokenizer(str(model_folder)), str(model_folder), 16)
    assert changed.after != kept.after


def test_the_backbone_of_an_encoder_and_decoder_is_the_encoder():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForSequenceClassification(BartConfig(vocab_size=15, **sizes, **heads))
    assert backbone_of(model) is model.model.encoder


def test_probes_make_another_run_and_their_absence_the_same():
    plan = Plan("full", 1e-4, "cola", 0, "tiny")
    assert plan.key == replace(plan, probes={}).key != replace(plan, probes={"pairs": "f"}).key


def test_wise_ft_ends_with_the_average(run, task):
    whole, half = run(), run("wise-ft")
    all_of_it = run("wise-ft", options={"alpha": 1.0})
    assert half.losses == whole.losses == all_of_it.losses
    assert all_of_it.retention == whole.retention
    assert all_of_it.evaluations == whole.evaluations
    assert half.evaluations[0] == whole.evaluations[0]
    assert len(half.evaluations) == len(whole.evaluations)
    assert half.evaluations[-1].loss != whole.evaluations[-1].loss
    assert half.evaluations[-1].score == half.validation_score
    assert half.retention != whole.retention
