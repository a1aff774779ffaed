from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dps import DPSTrainerCallback, Stage
from peft_dps.errors import StateError
from tests import needs
from tests.resuming import assert_same
from tests.trainer_resuming import Sentences, make_base, make_trainer

ROOT = Path(__file__).parents[3]


def after(trace, step):
    return {name: tensor for name, tensor in trace.items() if int(name.split("/")[0]) > step}


def keep_only(folder, step):
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)


def in_a_new_process(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


PLANS = [
    ({}, {}, 5),
    ({"variant": "mix", "scope": "model"}, {"gradient_accumulation_steps": 2, "num_train_epochs": 4}, 2),
    ({"variant": "mix", "frozen": "gradient"}, {"optim": "adamw_torch_fused"}, 10),
    ({"frozen": "gradient"}, {"optim": "sgd", "optim_args": "momentum=0.9"}, 6),
]


@needs.resumed_epochs
@pytest.mark.slow
def test_a_new_process_resumes_bitwise(tmp_path):
    whole = []
    for index, (fields, arguments, stop) in enumerate(PLANS):
        folder = tmp_path / str(index)
        trainer = make_trainer(folder, fields, **arguments)
        trainer.train()
        keep_only(folder, stop)
        (folder / "plan.json").write_text(json.dumps({"fields": fields, "arguments": arguments}))
        whole.append(trainer.trace)
    run = in_a_new_process("-m", "tests.trainer_resuming", str(tmp_path))
    assert run.returncode == 0, run.stderr[-4000:]
    for index, (_, _, stop) in enumerate(PLANS):
        assert_same(load_file(tmp_path / str(index) / "trace.safetensors"), after(whole[index], stop))


@pytest.mark.supports("Training", "resuming to the bit, Trainer (`resume_from_checkpoint`)")
@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize(
    "stops", [(1, 3, 4), pytest.param((7, 11), marks=needs.resumed_epochs)], ids=["first epoch", "later"]
)
def test_every_checkpoint_resumes_bitwise(tmp_path, variant, stops):
    whole = make_trainer(tmp_path, {"variant": variant})
    whole.train()
    for stop in stops:
        resumed = make_trainer(tmp_path, {"variant": variant}, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert_same(resumed.trace, after(whole.trace, stop))
        assert resumed.model.dps_status() == whole.model.dps_status()


@needs.resumed_epochs
def test_a_resumed_training_saves_and_resumes_again(tmp_path):
    whole = make_trainer(tmp_path / "whole", {})
    whole.train()
    first = make_trainer(tmp_path / "parts", {})
    first.train()
    keep_only(tmp_path / "parts", 2)
    make_trainer(tmp_path / "parts", {}).train(resume_from_checkpoint=True)
    keep_only(tmp_path / "parts", 8)
    last = make_trainer(tmp_path / "parts", {}, restore_callback_states_from_checkpoint=True)
    last.train(resume_from_checkpoint=True)
    assert_same(last.trace, after(whole.trace, 8))


@needs.resumed_epochs
def test_with_the_best_model_at_the_end_and_one_checkpoint_kept(tmp_path):
    def make():
        trainer = make_trainer(
            tmp_path,
            {"stage_steps": 2},
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="step",
            greater_is_better=True,
            save_total_limit=1,
        )
        # Step 5 is the best, so that its checkpoint outlives the others.
        trainer.compute_metrics = lambda _: {"step": -abs(trainer.state.global_step - 5)}
        return trainer

    whole = make()
    whole.train()
    keep_only(tmp_path, 5)
    best = {name: tensor for name, tensor in whole.trace.items() if name.startswith("5/weights/")}
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed.trace, after(whole.trace, 5))
    for trainer in (whole, resumed):
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.detach().view(torch.int32), best[f"5/weights/{name}"])


def test_a_checkpoint_holds_the_state_beside_the_adapter_and_not_in_it(tmp_path):
    make_trainer(tmp_path, {}, save_steps=5).train()
    folder = tmp_path / "checkpoint-5"
    assert (folder / "dps_state.default.safetensors").is_file()
    assert not any("mask" in name or "total" in name for name in load_file(folder / "adapter_model.safetensors"))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert list(state["stateful_callbacks"]["DPSTrainerCallback"]["attributes"]["saved"]) == ["default"]


@pytest.mark.parametrize("path", [str, Path])
def test_a_moved_checkpoint_is_an_error_that_names_the_remedy(tmp_path, path):
    whole = make_trainer(tmp_path / "here", {})
    whole.train()
    folder = str(tmp_path / "there")
    shutil.move(tmp_path / "here" / "checkpoint-5", folder)
    with pytest.raises(StateError, match=r"step 5, .*TrainingArguments\(..., resume_from_checkpoint=") as error:
        make_trainer(tmp_path / "new", {}).train(resume_from_checkpoint=folder)
    assert str(tmp_path / "new" / "checkpoint-5") in str(error.value)
    resumed = make_trainer(tmp_path / "new", {}, resume_from_checkpoint=path(folder))
    resumed.train(resume_from_checkpoint=folder)
    assert_same(resumed.trace, after(whole.trace, 5))


def test_a_training_begun_anew_after_an_interruption_leaves_the_checkpoint(tmp_path):
    class Interruption(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, {})
    trainer.add_callback(Interruption())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = tmp_path / "checkpoint-5" / "dps_state.default.safetensors"
    before = saved.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert saved.stat().st_mtime_ns == before


def test_the_state_of_another_training_is_not_taken(tmp_path):
    make_trainer(tmp_path / "one", {}, max_steps=5).train()
    make_trainer(tmp_path / "two", {}, max_steps=5, seed=7).train()
    with pytest.raises(StateError, match="a file of another training"):
        make_trainer(tmp_path / "two", {}).train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-5"))


def test_a_checkpoint_without_a_state_is_never_a_silent_restart(tmp_path):
    trainer = make_trainer(tmp_path, {})
    trainer.remove_callback(DPSTrainerCallback)
    trainer.train()
    with pytest.raises(StateError, match=r"holds no training state of the DPS adapter 'default'.*is_trainable=True"):
        make_trainer(tmp_path, {}).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "only", {}, save_only_model=True, max_steps=4).train()
    assert not list((tmp_path / "only").rglob("dps_state*"))
    with pytest.raises(StateError, match="save_only_model"):
        make_trainer(tmp_path / "only", {}).train(resume_from_checkpoint=True)


def test_the_remedy_that_the_error_names_works(tmp_path):
    make_trainer(tmp_path, {}, max_steps=4).train()
    trainer = make_trainer(tmp_path / "new", {})
    trainer.model = trainer.model_wrapped = PeftModel.from_pretrained(
        make_base(), tmp_path / "checkpoint-4", is_trainable=True
    )
    trainer.train()
    assert trainer.model.dps_status().steps == 12


def test_other_settings_are_refused(tmp_path):
    make_trainer(tmp_path, {}, max_steps=5).train()
    with pytest.raises(StateError, match=r"begun with `density=0.25`, and its config now has 0.5"):
        make_trainer(tmp_path, {"density": 0.5}).train(resume_from_checkpoint=True)


def test_a_longer_training_keeps_its_stages(tmp_path, caplog):
    make_trainer(tmp_path, {"stage_steps": 0.5}, max_steps=20, save_steps=20).train()
    trainer = make_trainer(tmp_path, {"stage_steps": 0.5}, max_steps=24, save_steps=20)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "was to have 20 steps when its state was saved, and now has 24" in caplog.text
    status = trainer.model.dps_status()
    assert (status.steps, status.stage_steps, status.total_steps) == (24, 10, 24)
    assert (status.stage, status.cycle) == (Stage.ACCUMULATE, 2)


def test_models_without_dps_resume_as_ever(tmp_path):
    def make(with_callback):
        model = get_peft_model(make_base(), LoraConfig(task_type="SEQ_CLS"))
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=4, save_steps=2, use_cpu=True, report_to="none"
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
        if not with_callback:  # as without `import peft_dps`
            trainer.remove_callback(DPSTrainerCallback)
            trainer.state.stateful_callbacks.pop("DPSTrainerCallback")
        return trainer

    make(with_callback=False).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = make(with_callback=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert not list(tmp_path.rglob("dps_state*"))


# ---- Killed while saving --------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from pathlib import Path
import torch
from transformers import Trainer, TrainerState
from peft_dps.checkpoint import file as statefile
from tests.trainer_resuming import make_trainer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(original, step, half=False):
    # At the checkpoint of that step the process dies before, or half-way through.
    calls = []
    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            if half:
                original(*args, **kwargs)
                path = Path(args[1])
                os.truncate(path, path.stat().st_size // 2)
            die()
        return original(*args, **kwargs)
    return function

STEP = 5
points = {
    "adapter": (Trainer, "save_model", dying(Trainer.save_model, STEP)),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler", dying(Trainer._save_optimizer_and_scheduler, STEP)),
    "half of DPS": (statefile, "save_file", dying(statefile.save_file, STEP, half=True)),
    "trainer state": (TrainerState, "save_to_json", dying(TrainerState.save_to_json, STEP)),
    "half of trainer state": (TrainerState, "save_to_json", dying(TrainerState.save_to_json, STEP, half=True)),
}
for folder in Path(sys.argv[1]).iterdir():
    if os.fork() == 0:
        setattr(*points[folder.name])
        make_trainer(folder, {"variant": "mix"}, save_total_limit=1).train()
        os._exit(0)
    _, status = os.wait()
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, folder.name)
"""
POINTS = ("adapter", "optimizer", "half of DPS", "trainer state", "half of trainer state")


@pytest.mark.slow
def test_a_checkpoint_killed_at_each_point_leaves_the_previous_one(tmp_path, caplog):
    for point in POINTS:
        (tmp_path / point).mkdir()
    run = in_a_new_process("-c", DIES, str(tmp_path))
    assert run.stdout.count(f"{int(signal.SIGKILL)} ") == len(POINTS), run.stdout + run.stderr
    whole = make_trainer(tmp_path / "whole", {"variant": "mix"}, save_strategy="no")
    whole.train()
    for point in POINTS:
        folder = tmp_path / point
        incomplete = (folder / "checkpoint-5").is_dir()
        caplog.clear()
        trainer = make_trainer(folder, {"variant": "mix"})
        named = re.search(r"not written to its end, .*: resume from '(.*checkpoint-4)'", caplog.text)
        assert bool(named) is incomplete, point
        if incomplete:  # and whoever does not read it gets an error, of transformers
            with pytest.raises((OSError, ValueError)):
                make_trainer(folder, {"variant": "mix"}).train(resume_from_checkpoint=True)
        trainer.train(resume_from_checkpoint=named[1] if named else True)
        assert_same(trainer.trace, after(whole.trace, 4))
