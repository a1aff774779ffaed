from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from peft_dps.compare.data.task import build_task
from peft_dps.compare.runs import training as module
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.pretrained import load_model
from peft_dps.compare.runs.recorder import thinned
from peft_dps.compare.runs.run import Candidate, to_json
from peft_dps.compare.runs.training import train
from peft_dps.compare.settings import Settings

SETTINGS = Settings(epochs=2, batch_size=8, max_length=16, validation_size=8, evaluations=3)
CANDIDATES = [Candidate(1e-2, [0], 0.5, chosen=True)]


@pytest.fixture
def task(examples):
    return build_task("mine", examples(), {"here": examples(18), "there": examples(12, "there")}, SETTINGS)


@pytest.fixture
def run(task, model_folder):
    def run(method="full", seed=0, reports=None, task=task, **fields):
        values = {"method": method, "learning_rate": 1e-2, "task": task.name, "seed": seed, "model": "tiny"}
        plan = Plan(**{**values, "settings": SETTINGS, **fields})
        report = (lambda *content: None) if reports is None else lambda *content: reports.append(content)
        return train(plan, method, task, str(model_folder), CANDIDATES, report)

    return run


def test_the_record_of_full_fine_tuning(run, task):
    reports = []
    record = run(reports=reports)
    assert list(record.scores) == ["here", "there"]
    assert all(set(scores) == {"accuracy"} and 0 <= scores["accuracy"] <= 1 for scores in record.scores.values())
    steps = 2 * math.ceil(52 / 8)
    assert (len(record.losses), record.loss_steps) == (steps, 1)
    assert [evaluation.step for evaluation in record.evaluations] == [5, 9, steps]
    assert record.evaluations[-1].score == record.validation_score
    assert record.seconds > 0
    assert record.trainable > 0
    assert record.file_size > 4 * record.trainable
    assert record.peak_memory > 0
    assert (record.memory_kind, record.selected, record.frozen_moved, record.status) == ("resident", None, None, "")
    assert record.examples == task.sizes
    assert record.candidates == CANDIDATES
    assert record.hardware["cores"] >= 1
    assert record.versions["torch"]
    assert reports[-1][:2] == (steps, steps)
    assert not record.failed
    json.loads(to_json(record))


def test_methods_of_one_seed_see_the_same_data_in_the_same_order(run):
    records = [run("full"), run("bitfit"), run("dps-mix", options={"stage_steps": 3}), run("full-nodropout")]
    assert len({record.order for record in records}) == 1
    assert run(seed=1).order != records[0].order
    assert [record.trainable < records[0].trainable for record in records] == [False, True, False, False]
    assert records[1].file_size < records[0].file_size


def test_the_same_plan_gives_the_same_run(run):
    options = {"stage_steps": 3}
    one, other = run("dps-dense", options=options), run("dps-dense", options=options)
    assert one.losses == other.losses
    assert one.scores == other.scores
    assert one.losses != run("dps-dense", seed=1, options=options).losses


def test_looking_at_the_validation_split_leaves_dropout_alone(run):
    once = replace(SETTINGS, evaluations=1)
    assert run("full", settings=once).losses == run("full").losses


def test_every_seed_draws_random_masks_of_its_own(run):
    runs = [run("random-mask", seed, options={"stage_steps": 1}) for seed in (0, 1)]
    masks = [[selection.overlap for selection in run.selections] for run in runs]
    assert masks[0] != masks[1]


def test_dps_tells_subnetworks_and_their_overlap(run):
    record = run("dps-dense", options={"density": 0.3, "stage_steps": 3})
    first, second = record.selections
    assert (first.cycle, first.first, first.last) == (1, 4, 6)
    assert (second.cycle, second.first, second.last) == (2, 10, 12)
    assert (first.overlap, first.chance) == ([], None)
    mean, least, most = second.overlap
    assert 0 < least < mean < most < 1
    assert second.chance == pytest.approx(0.3 / 1.7, abs=0.001)
    assert record.fractions == {}  # the same of each weight
    assert record.frozen_moved is False
    assert "subnetwork 3/3" in record.status
    assert record.config["density"] == 0.3
    weights = [32 * 32] * 9 + [32 * 64] * 4  # attention and pooler, feed-forward
    assert record.trainable - record.selected == sum(n - math.ceil(0.3 * n) for n in weights)


def test_what_is_compact_has_no_frozen_entries_among_those_it_trains(run):
    record = run("recipe:paca", options={"units": 4})
    assert (record.selected, record.frozen_moved) == (None, False)
    assert record.selections


def test_random_masks_overlap_as_chance_has_it(run):
    record = run("random-mask", options={"density": 0.3, "stage_steps": 3})
    assert record.selections[1].overlap == pytest.approx([0.3 / 1.7] * 3, abs=0.04)


def test_what_is_chosen_over_the_model_tells_the_fraction_of_each_weight(run):
    record = run("dps-dense", options={"density": 0.3, "stage_steps": 3, "scope": "model"})
    assert len(record.fractions) == 13
    assert "bert.encoder.layer.0.attention.self.query" in record.fractions
    assert min(record.fractions.values()) < 0.3 < max(record.fractions.values())


def test_stages_of_one_step_are_followed(run):
    record = run("dps-mix", options={"stage_steps": 1})
    assert [(each.first, each.last) for each in record.selections] == [(step, step) for step in range(2, 15, 2)]
    assert "subnetwork 1/1" in record.status


def test_long_curves_are_thinned():
    assert thinned([1.0, 2.0]) == ([1.0, 2.0], 1)
    losses, every = thinned([1.0] * 100 + [4.0])
    assert (len(losses), every, losses[-1]) == (34, 3, 2.5)


def test_density_one_selects_all(run):
    record = run("dps-dense", options={"density": 1.0, "stage_steps": 3})
    assert (record.selections[1].overlap, record.selections[1].chance) == ([1.0] * 3, 1.0)
    assert record.selected == record.trainable


@pytest.mark.parametrize("method", ["full", "dps-mix"])
def test_bf16_is_mixed_precision(method, run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 leaves it for the next training
    seen = set()

    class Watching(module._Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            hidden = model.get_base_model() if method == "dps-mix" else model
            layer = hidden.bert.encoder.layer[0].intermediate.dense
            hook = layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            hook.remove()
            seen_weights.update(parameter.dtype for parameter in model.parameters())
            return loss

    seen_weights = set()
    options = {"stage_steps": 3} if method == "dps-mix" else {}
    plain = run(method, options=options)
    monkeypatch.setattr(module, "_Trainer", Watching)
    mixed = run(method, options=options, settings=replace(SETTINGS, precision="bf16"))
    assert seen == {torch.bfloat16}
    assert seen_weights == {torch.float32}
    assert not mixed.failed
    assert mixed.order == plain.order
    assert mixed.losses != plain.losses
    assert mixed.evaluations[-1].loss != plain.evaluations[-1].loss
    assert mixed.losses == pytest.approx(plain.losses, abs=0.2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_what_was_asked_for(attention, run, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "load_model", lambda *given: seen.append(load_model(*given)) or seen[-1])
    assert not run(settings=replace(SETTINGS, attention=attention)).failed
    assert seen[0].config._attn_implementation == attention


def test_a_try_looks_at_the_validation_split_alone(run):
    record = run(phase="tune")
    assert record.scores == {}
    assert len(record.evaluations) == 1
    assert 0 <= record.validation_score <= 1
    assert (record.file_size, record.losses, record.config) == (0, [], {})


def test_regression(run, examples):
    numbers = examples(regression=True)
    task = build_task("numbers", numbers, {"here": numbers}, SETTINGS, ["pearson", "spearman"])
    record = run(task=task)
    assert -1 <= record.score() <= 1
    assert set(record.scores["here"]) == {"pearson", "spearman"}


def test_merged_classes_are_merged_in_the_predictions(task):
    logits = np.array([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    compute = module._metrics(task, (0, 1, 1))
    assert compute(EvalPrediction(logits, np.array([0, 1, 1]))) == {"accuracy": 1.0}
    assert module._metrics(task)(EvalPrediction((logits, None), np.array([0, 1, 1]))) == {"accuracy": 2 / 3}
