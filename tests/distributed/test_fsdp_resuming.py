"""Trainings that FSDP2 has cut over processes resume to the bit, in new processes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dps import dps_adapter
from peft_dps.checkpoint.parts import find_save
from tests import needs
from tests.distributed.fsdp_worker import batches, everything, make_model, optimizer_of, train_alone
from tests.launching import torchrun
from tests.resuming import assert_same

pytestmark = [pytest.mark.slow, needs.fsdp2]
WORKER = "fsdp_resume_worker.py"
MIX = {"variant": "mix"}
LT_SFT = {"schedule": "two-phase", "score": "movement", "scope": "model"}
# Stages are 3 steps long.
PLANS = [
    {"fields": {}, "stop": 2},
    {"fields": {"scope": "model"}, "stop": 5},
    {"fields": MIX, "stop": 2},
    {"fields": MIX, "stop": 4},
    {"fields": {"frozen": "gradient"}, "stop": 5},
    {"fields": {**MIX, "frozen": "gradient"}, "stop": 5},
    {"fields": {**MIX, "offload_base": True}, "stop": 4},
    {"fields": {"lean": True}, "stop": 7},
    {"fields": {**MIX, "lean": True}, "stop": 5},
    {"fields": LT_SFT, "stop": 3},  # the next forward rewinds
    {"fields": LT_SFT, "stop": 5},
]
REPLICAS = [{"fields": {**MIX, "scope": "model"}, "stop": 5, "mesh": [2, 2]}]


def lay_out(folder, plans):
    for index, plan in enumerate(plans):
        (folder / str(index)).mkdir(parents=True)
        (folder / str(index) / "plan.json").write_text(json.dumps(plan))


def compare(folder, count):
    places = [path.parent for path in sorted(folder.glob("*/plan.json"))]
    assert len(places) == count
    for place in places:
        assert_same(load_file(place / "resume.safetensors"), load_file(place / "train.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have trained and saved in the middle, by torch's functions and by Accelerate."""
    folder = tmp_path_factory.mktemp("two")
    lay_out(folder / "two", PLANS)
    saves = ("SHARDED_STATE_DICT", "FULL_STATE_DICT", "SHARDED_STATE_DICT", "FULL_STATE_DICT")
    plans = zip((PLANS[3], PLANS[0], PLANS[6], PLANS[6]), saves, strict=True)
    lay_out(folder / "accelerate", [{**plan, "state_dict_type": kind} for plan, kind in plans])
    torchrun(WORKER, str(folder), "train=two", "accelerate_saves=accelerate")
    return folder


@pytest.mark.supports("Training", "resuming to the bit, FSDP2 (`save_dps_state`, Accelerate's `save_state`)")
def test_fsdp2_resumes_bitwise_and_refuses_what_does_not_belong_together(folder):
    torchrun(
        WORKER,
        str(folder),
        "resume=two",
        "a_save_and_a_load_communicate_little=two",
        "what_does_not_belong_together_is_refused_on_all=two",
        "a_save_that_fails_on_one_leaves_the_earlier_one=two",
        "accelerate_resumes=accelerate",
    )
    compare(folder / "two", len(PLANS))
    compare(folder / "accelerate", 4)


def alone(plan):
    model = make_model(plan["fields"])
    optimizer = optimizer_of(model)
    train_alone(model, optimizer, batches(8)[: plan["stop"]], clip=None)
    return model, optimizer


def weights_at(place, step):
    prefix = f"{step}/base_model."
    held = load_file(place / "train.safetensors")
    return {
        name.removeprefix(f"{step}/"): tensor.view(torch.float64)
        for name, tensor in held.items()
        if name.startswith(prefix)
    }


def put_together(place, plan, step):
    """One process goes on with what several have saved."""
    model = make_model(plan["fields"])
    model.load_state_dict(weights_at(place, step))
    dps_adapter(model).load_state(place / "dps.safetensors")
    assert model.dps_status().steps == step
    saved = load_file(place / "train.safetensors")
    assert_same(
        everything(model),
        {n.removeprefix(f"{step}/"): tensor for n, tensor in saved.items() if n.startswith(f"{step}/")},
    )
    return model


@pytest.mark.supports("Training", "resuming with another number of processes, FSDP2 and one process")
def test_another_number_of_processes_resumes_with_the_same_state(folder, tmp_path):
    shutil.copytree(folder / "two", tmp_path / "two")
    lay_out(tmp_path / "one", PLANS)
    for index, plan in enumerate(PLANS):
        place = tmp_path / "one" / str(index)
        model, _ = alone(plan)
        save_file(model.state_dict(), place / "weights.safetensors")
        dps_adapter(model).save_state(place / "dps.safetensors")
        save_file(everything(model), place / "alone.safetensors")
    # Of three processes the last holds no row of the last weight.
    lay_out(tmp_path / "three", [PLANS[2], PLANS[3]])
    torchrun(
        WORKER,
        str(tmp_path),
        "load_what_one_process_saved=one",
        "load_in_another_number=two",
        "train=three",
        processes=3,
    )
    torchrun(WORKER, str(tmp_path), "resume=three", processes=3)
    compare(tmp_path / "three", 2)
    for place, plans in (("two", PLANS), ("three", [PLANS[2], PLANS[3]])):
        for index, plan in enumerate(plans):
            model = put_together(tmp_path / place / str(index), plan, plan["stop"])
            # The optimizer of "gradient" has moved frozen entries of ACCUMULATE's momentum.
            assert model.dps_status().frozen_moved is (plan["fields"].get("frozen") == "gradient")
            train_alone(model, optimizer_of(model), batches(8)[plan["stop"] :], clip=None)
            assert model.dps_status().engaged


@pytest.mark.supports("Training", "resuming to the bit, HSDP; with another number of processes, the same state")
def test_replicas_of_shards_resume_bitwise(tmp_path):
    lay_out(tmp_path, REPLICAS)
    torchrun(WORKER, str(tmp_path), "train=.", processes=4)
    torchrun(WORKER, str(tmp_path), "resume=.", processes=4)
    compare(tmp_path, len(REPLICAS))
    torchrun(WORKER, str(tmp_path), "load_in_another_number=.", processes=2)
    for index, plan in enumerate(REPLICAS):
        put_together(tmp_path / str(index), plan, plan["stop"])


def test_a_process_killed_while_it_saves_leaves_the_previous_state(folder, tmp_path):
    shutil.copytree(folder / "two" / "3", tmp_path / "two" / "3")
    place = tmp_path / "two" / "3"
    before = find_save(place / "dps.safetensors")
    said = torchrun(WORKER, str(tmp_path), "die_in_a_save=two", fails=True)
    assert "Signal 9" in said
    left = {entry.name for entry in place.glob("*dps.*")} - {path.name for path in before.paths}
    assert any(name.endswith(".part") for name in left), left  # it was killed in the middle
    assert find_save(place / "dps.safetensors") == before
    put_together(place, PLANS[3], PLANS[3]["stop"])


@pytest.mark.supports("Training", "resuming to the bit, Trainer with FSDP2 (`resume_from_checkpoint`)")
def test_the_trainer_resumes_bitwise_under_fsdp2(tmp_path):
    torchrun("fsdp_trainer_worker.py", "train", str(tmp_path))
    torchrun("fsdp_trainer_worker.py", "resume", str(tmp_path))
    for place in (tmp_path / "0", tmp_path / "1"):
        for rank in range(2):
            ours, theirs = (load_file(place / f"{mode}{rank}") for mode in ("resume", "train"))
            assert any("/keep/" in name for name in theirs)
            assert_same(ours, theirs)
