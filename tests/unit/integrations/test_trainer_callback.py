from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from peft_dps import DPSConfig, DPSTrainerCallback, Stage
from peft_dps.errors import ConfigError, EngineError, ScheduleError
from peft_dps.integrations.trainer_callback import install


class Sentences(Dataset):
    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].sum() % 2}


@pytest.fixture
def make_trainer(tmp_path):
    def make(fields=None, **arguments) -> Trainer:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = get_peft_model(
            BertForSequenceClassification(config), DPSConfig(task_type="SEQ_CLS", density=0.25, **(fields or {}))
        )
        arguments = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **arguments,
        }
        return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Sentences())

    return make


def test_trainer_finds_the_number_of_steps_and_logs_the_stages(make_trainer):
    trainer = make_trainer({"stage_steps": 0.5}, num_train_epochs=4)
    trainer.train()
    status = trainer.model.dps_status()
    assert (status.total_steps, status.stage_steps, status.steps) == (24, 12, 24)
    assert status.stage is Stage.SUBNETWORK
    assert status.engaged
    assert not status.frozen_moved
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    stages = [entry["dps_stage"] for entry in logs]
    assert stages == ["accumulate"] * 12 + ["subnetwork"] * 12
    assert [entry["dps_cycle"] for entry in logs] == [1] * 24
    assert logs[0]["dps_selected"] is None
    assert logs[12]["dps_selected"] == pytest.approx(0.25, abs=1e-3)


def test_a_stage_of_little_data_has_ten_steps_and_says_so(make_trainer, caplog):
    trainer = make_trainer(num_train_epochs=4)
    trainer.train()
    assert (trainer.model.dps_status().stage_steps, trainer.model.dps_status().engaged) == (10, True)
    assert caplog.text.count("`stage_steps=0.05` of 24 training steps is 1. A stage has 10 steps") == 1


def test_too_little_data_for_two_stages_is_an_error_before_the_first_step(make_trainer):
    trainer = make_trainer(num_train_epochs=3)
    with pytest.raises(ConfigError, match=r"fraction of only 18 training steps.* training needs 20.*as an int"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_compact_columns_of_little_data_say_that_scoring_takes_most_of_it(make_trainer, caplog):
    fields = {"storage": "compact", "granularity": "column", "schedule": "once"}
    trainer = make_trainer(fields)
    trainer.train()
    assert trainer.model.dps_status().engaged
    assert "`score_steps=8` of 12 training steps leaves 4 to train what is selected" in caplog.text
    with pytest.raises(ConfigError, match="`score_steps` is 8 of only 6"):
        make_trainer(fields, num_train_epochs=1).train()


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"schedule": "two-phase", "stage_steps": 3, "score": "movement"}, ["accumulate"] * 3 + ["subnetwork"] * 9),
        ({"schedule": "full", "noise": "mixout"}, ["full"] * 12),
        ({"schedule": "every", "stage_steps": 1, "score_steps": 0, "score": "random"}, ["subnetwork"] * 12),
    ],
)
def test_the_trainer_runs_every_schedule(make_trainer, fields, stages):
    trainer = make_trainer(fields, gradient_accumulation_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["dps_stage"] for entry in logs] == stages
    assert trainer.model.dps_status().engaged is (stages[-1] != "full")


def test_what_is_reported_is_numbers(make_trainer):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer({"stage_steps": 3})
    trainer.add_callback(Reporter)
    trainer.train()
    assert all(isinstance(value, (int, float)) for logs in seen for value in logs.values())
    steps = [logs for logs in seen if "loss" in logs]
    assert [logs["dps_subnetwork"] for logs in steps] == [0, 0, 0, 1, 1, 1] * 2
    assert [logs["dps_cycle"] for logs in steps] == [1] * 6 + [2] * 6
    assert "dps_selected" not in steps[2]
    assert steps[3]["dps_selected"] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.supports("Training", "Trainer: as a plain loop, to the bit")
def test_trainer_equals_a_plain_loop(make_trainer):
    trainer = make_trainer({"stage_steps": 2}, gradient_accumulation_steps=2, max_grad_norm=0.1)
    twin = make_trainer({"stage_steps": 2}).model
    seen, losses = [], []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append({key: value.clone() for key, value in inputs.items() if key in ("input_ids", "labels")})
        return original(model, inputs, *args, **kwargs)

    def record(grads, original=trainer.accelerator.backward):
        losses.append(grads.item())
        original(grads)

    trainer.compute_loss = compute_loss
    trainer.accelerator.backward = lambda loss, **kwargs: record(loss)
    trainer.train()
    assert len(seen) == 12

    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    twin.train()
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        optimizer.zero_grad()
        for batch in (first, second):
            loss = twin(**batch).loss
            factor = losses.pop(0) / loss.item()  # how the Trainer weighs micro-batches is its business
            (loss * factor).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    assert trainer.model.dps_status() == dataclasses.replace(twin.dps_status(), total_steps=6)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


def test_a_config_that_names_another_total_wins_and_says_so(make_trainer, caplog):
    trainer = make_trainer({"stage_steps": 0.25, "total_steps": 40})
    trainer.train()
    assert trainer.model.dps_status().stage_steps == 10
    assert "`total_steps` is 40, and the Trainer will make 12 steps. A stage has 10 steps" in caplog.text


@pytest.mark.parametrize("fields", [{"stage_steps": 0.5, "total_steps": 24}, {"stage_steps": 12, "total_steps": 40}])
def test_a_total_that_changes_nothing_is_not_spoken_of(make_trainer, caplog, fields):
    trainer = make_trainer(fields, num_train_epochs=4)
    trainer.train()
    assert trainer.model.dps_status().stage_steps == 12
    assert "`total_steps`" not in caplog.text


def test_a_second_training_starts_anew(make_trainer):
    trainer = make_trainer({"stage_steps": 4})
    trainer.train()
    trainer.train()
    assert trainer.model.dps_status().steps == 12


def test_stages_that_do_not_fit_the_training_are_refused(make_trainer):
    with pytest.raises(ConfigError, match="`stage_steps` is 12 of only 12"):
        make_trainer({"stage_steps": 12}).train()


def test_without_the_callback_a_fraction_is_refused(make_trainer):
    trainer = make_trainer({"stage_steps": 0.25})
    trainer.remove_callback(DPSTrainerCallback)
    with pytest.raises(ScheduleError, match="number is unknown"):
        trainer.train()


def test_an_optimizer_that_hides_its_steps_is_an_error(make_trainer):
    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(0.1 * parameter.grad)

        step.hooked = True  # keeps torch from adding its hooks

    trainer = make_trainer({"stage_steps": 2})
    trainer.optimizer = Hidden([p for p in trainer.model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(EngineError, match="without an optimizer step that DPS could see"):
        trainer.train()


def test_short_trainings_with_hidden_steps_are_an_error_at_the_end(make_trainer):
    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.add_(1.0)

        step.hooked = True

    trainer = make_trainer({"stage_steps": 1}, max_steps=2)
    trainer.optimizer = Hidden([p for p in trainer.model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(EngineError, match="DPS has seen none"):
        trainer.train()


def test_models_without_dps_are_left_alone(make_trainer):
    trainer = make_trainer()
    trainer.model = trainer.model_wrapped = trainer.model.unload()
    trainer.model.requires_grad_(True)
    trainer.train()
    assert not any("dps_stage" in entry for entry in trainer.state.log_history)


def test_every_new_trainer_has_the_callback_once(make_trainer):
    install()
    install()
    assert sum(callback is DPSTrainerCallback for callback in DEFAULT_CALLBACKS) == 1
    handler = make_trainer().callback_handler
    assert sum(isinstance(callback, DPSTrainerCallback) for callback in handler.callbacks) == 1


def test_a_total_that_does_not_fit_the_trainer_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"the first stage takes 50 steps .* the Trainer has only 12"):
        make_trainer({"stage_steps": 0.05, "total_steps": 1000}).train()


def test_resuming_a_finished_training_is_no_alarm(make_trainer, tmp_path):
    make_trainer({"stage_steps": 2}, save_strategy="epoch").train()
    trainer = make_trainer({"stage_steps": 2}, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_a_trainer_keeps_nothing_of_a_model_after_training(make_trainer):
    trainer = make_trainer({"stage_steps": 2})
    trainer.train()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DPSTrainerCallback))
    assert callback._controllers == []
