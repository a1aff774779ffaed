from __future__ import annotations

import copy
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW

from peft_dps import Stage, dps_adapter
from peft_dps.errors import ConfigError, StateError
from tests.resuming import Plan, Training, assert_same
from tests.unit.conftest import controller_of, layers_of, train, trainable, weights_of

pytestmark = pytest.mark.device

ROOT = Path(__file__).parents[3]
AXES = [("dense", "mix"), ("exact", "gradient"), ("tensor", "model"), ("adamw", "sgd"), (1, 2)]
PLANS = [
    Plan(variant=variant, frozen=frozen, scope=scope, optimizer=optimizer, micro_batches=micro_batches)
    for variant, frozen, scope, optimizer, micro_batches in itertools.product(*AXES)
]
PLANS += [Plan(variant=variant, score="random") for variant in ("dense", "mix")]
PLANS += [Plan(variant=variant, score_dtype="bfloat16") for variant in ("dense", "mix")]
PLANS += [Plan(variant=variant, density=1.0) for variant in ("dense", "mix")]
PLANS += [
    Plan(variant=variant, frozen=frozen, scope=scope, micro_batches=micro_batches, lean=True)
    for variant, frozen, scope, micro_batches in itertools.product(*(axis for axis in AXES if "sgd" not in axis))
]
_stops = random.Random(0)
STOPS = [(plan, _stops.randint(1, plan.steps - 1)) for plan in PLANS]


@pytest.mark.parametrize(("plan", "stop"), STOPS, ids=str)
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(plan, stop, tmp_path):
    whole = Training(plan)
    whole.run(stop)
    whole.save(tmp_path)
    expected = whole.trace()
    resumed = Training.resumed(tmp_path)
    assert_same(resumed.everything(), as_saved(tmp_path))
    for ours, theirs in zip(resumed.trace(), expected, strict=True):
        assert_same(ours, theirs)
    assert resumed.model.dps_status() == whole.model.dps_status()


def as_saved(folder):
    """What a training holds that was never saved, at the step at which another one was."""
    stop = json.loads((folder / "plan.json").read_text())
    step = stop.pop("stopped")
    random_state = torch.get_rng_state()
    training = Training(Plan(**stop))
    training.run(step)
    torch.set_rng_state(random_state)
    return training.everything()


def test_the_stops_reach_both_stages_of_every_variant_and_policy():
    reached = {(plan.variant, plan.frozen, (stop - 1) // plan.stage_steps % 2) for plan, stop in STOPS}
    assert len(reached) == 8


def test_every_step_of_a_cycle_can_be_a_stop(tmp_path):
    for variant, lean in itertools.product(("dense", "mix"), (False, True)):
        whole = Training(Plan(variant=variant, steps=9, lean=lean))
        for stop in range(9):
            whole.run(stop)
            whole.save(tmp_path / f"{variant}{lean}{stop}")
        whole.run(9)
        for stop in range(9):
            resumed = Training.resumed(tmp_path / f"{variant}{lean}{stop}")
            resumed.run(9)
            assert_same(resumed.everything(), whole.everything())


@pytest.mark.slow
def test_new_processes_resume_bitwise(tmp_path):
    ends = {}
    for index, (plan, stop) in enumerate([(PLANS[0], 5), (PLANS[5], 2), (PLANS[17], 4), (PLANS[24], 11)]):
        training = Training(plan)
        training.run(stop)
        training.save(tmp_path / str(index))
        training.run(plan.steps)
        ends[index] = training.everything()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "tests.resuming", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    for index, end in ends.items():
        assert_same(load_file(tmp_path / str(index) / "end.safetensors"), end)


def test_a_state_taken_after_a_forward_of_the_next_stage_goes_on(make_model, batches):
    for stop in (2, 4):
        model = make_model(variant="mix")
        optimizer = SGD(trainable(model), lr=0.1)
        data = batches(7)
        train(model, optimizer, data[:stop])
        model(data[0][0])  # enters SUBNETWORK, or draws noise
        other = make_model(variant="mix")
        other.load_state_dict(model.state_dict())
        other.load_dps_state_dict(copy.deepcopy(model.dps_state_dict()))
        train(model, optimizer, data[stop:])
        train(other, SGD(trainable(other), lr=0.1), data[stop:])
        assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(other), strict=True))


def test_a_state_taken_between_two_optimizers_of_a_step_goes_on(make_model, batches):
    def steppers(model):
        return [SGD(layer.parameters(), lr=0.1) for layer in layers_of(model)]

    def half_step(model, optimizer, batch):
        model.zero_grad()
        x, y = batch
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    model = make_model()
    first, second = steppers(model)
    data = batches(10)
    for batch in data[:5]:
        half_step(model, first, batch)
        if batch is not data[4]:
            half_step(model, second, batch)
    other = make_model()
    other.load_state_dict(model.state_dict())
    other.load_dps_state_dict(copy.deepcopy(model.dps_state_dict()))
    for each, (one, two) in ((model, (first, second)), (other, steppers(other))):
        half_step(each, two, data[4])
        assert each.dps_status().steps == 5
        half_step(each, one, data[5])
        assert each.dps_status().steps == 6


def test_no_more_is_stored_than_needed(make_model, batches):
    for variant, frozen, kinds in (
        ("dense", "exact", {"mask"}),
        ("dense", "gradient", {"mask"}),
        ("mix", "exact", {"mask", "snapshot"}),
        ("mix", "gradient", {"mask", "snapshot"}),
    ):
        model = make_model(variant=variant, frozen=frozen, density=0.25, sizes=(16, 12, 3))
        optimizer = SGD(trainable(model), lr=0.1)
        train(model, optimizer, batches(2, features=16))
        tensors = model.dps_state_dict()["tensors"]
        assert {name.rpartition(".")[2] for name in tensors} == {"total", *(["participation"] * (variant == "mix"))}
        train(model, optimizer, batches(1, features=16))
        tensors = model.dps_state_dict()["tensors"]
        assert {name.rpartition(".")[2] for name in tensors} == kinds
        assert tensors["layers.0.mask"].numel() == 24  # 192 entries
        if variant == "mix":
            assert tensors["layers.0.snapshot"].numel() == 192  # all, so that it can be cut by rows


def test_the_header_is_fit_for_json_and_the_state_for_weights_only(make_model, batches, tmp_path):
    model = make_model(variant="mix")
    train(model, AdamW(trainable(model)), batches(3))
    state = model.dps_state_dict()
    assert json.loads(json.dumps(state["header"])) == state["header"]
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_dps_state_dict(loaded)
    assert model.dps_status().steps == 3


def test_a_state_may_be_loaded_twice_and_stays_as_it_is(make_model, batches):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(1))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = copy.deepcopy(model.dps_state_dict())
    untouched = copy.deepcopy(state["tensors"])
    ends = []
    for _ in range(2):
        model.load_state_dict(weights)
        model.load_dps_state_dict(state)
        train(model, optimizer, batches(4))
        ends.append([weight.detach().clone() for weight in weights_of(model)])
    assert_same(state["tensors"], untouched)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_before_the_first_step_is_a_fresh_start(make_model, batches):
    model, other = make_model(), make_model()
    other.load_dps_state_dict(model.dps_state_dict())
    assert other.dps_status() == model.dps_status()
    train(other, SGD(trainable(other), lr=0.1), batches(3))
    assert other.dps_status().steps == 3


def test_a_state_after_scoring_before_training_is_taken(make_model, batches):
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    data, models = batches(12), [make_model(schedule="once", score_steps=0) for _ in range(2)]
    optimizers = [SGD(trainable(model), lr=0.1) for model in models]
    for model in models:
        dps_adapter(model).score(model, data[:6], loss)
    for stop in (0, 2):  # fewer steps than were scored
        state = copy.deepcopy(models[0].dps_state_dict())
        models[0] = make_model(schedule="once", score_steps=0)
        models[0].load_state_dict(models[1].state_dict())
        models[0].load_dps_state_dict(state)
        optimizers[0] = SGD(trainable(models[0]), lr=0.1)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, data[6 + stop : 8 + stop])
        assert all(torch.equal(a, b) for a, b in zip(*map(weights_of, models), strict=True))
    assert models[0].dps_status() == models[1].dps_status()
    assert models[0].dps_status().engaged


# ---- What does not fit ----------------------------------------------------------------------------------------------


def refused(model, state, match):
    """Nothing may have changed when a state is refused."""
    before = copy.deepcopy(dps_adapter(model).state_dict())
    with pytest.raises(StateError, match=match):
        dps_adapter(model).load_state_dict(state)
    after = dps_adapter(model).state_dict()
    assert after["header"] == before["header"]
    assert_same(after["tensors"], before["tensors"])


@pytest.fixture
def state(make_model, batches):
    model = make_model(variant="mix")
    train(model, SGD(trainable(model), lr=0.1), batches(3))
    return copy.deepcopy(model.dps_state_dict())


@pytest.fixture
def model(make_model, batches):
    """Where the state fits: another training that was at the same step."""
    model = make_model(variant="mix")
    train(model, SGD(trainable(model), lr=0.1), batches(3))
    return model


def test_the_fixtures_fit(model, state):
    dps_adapter(model).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("variant", "dense"),
        ("density", 0.25),
        ("stage_steps", 4),
        ("scope", "model"),
        ("frozen", "gradient"),
        ("score", "random"),
        ("score_dtype", "bfloat16"),
        ("participation_decay", True),
        ("seed", 1),
    ],
)
def test_another_setting_is_refused_by_name(make_model, state, name, other):
    before = state["header"]["settings"][name]
    refused(
        make_model(**{"variant": "mix", name: other}), state, rf"begun with `{name}={before!r}`.* now has {other!r}"
    )


def test_another_number_of_steps_is_told_and_keeps_the_stages(make_model, batches, caplog):
    model = make_model(stage_steps=0.25, total_steps=40)
    train(model, SGD(trainable(model), lr=0.1), batches(11))
    longer = make_model(stage_steps=0.25, total_steps=80)
    longer.load_state_dict(model.state_dict())
    longer.load_dps_state_dict(model.dps_state_dict())
    assert "was to have 40 steps when its state was saved, and now has 80" in caplog.text
    assert "its phases stay as long as they were ({'stage_steps': 10})" in caplog.text
    status = longer.dps_status()
    assert (status.total_steps, status.stage_steps, status.steps, status.stage) == (80, 10, 11, Stage.SUBNETWORK)


@pytest.mark.parametrize("fraction", [0.05, None])
def test_a_number_of_steps_that_is_not_given_again_is_taken_over(make_model, batches, caplog, fraction):
    model = make_model(stage_steps=fraction, total_steps=300)
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    other = make_model(stage_steps=fraction)
    other.load_state_dict(model.state_dict())
    other.load_dps_state_dict(model.dps_state_dict())
    assert other.dps_status() == model.dps_status()
    assert not caplog.text


def test_the_state_of_another_adapter_is_refused(make_model, state):
    model = make_model(variant="mix")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(StateError, match="adapter 'default', not of 'other'"):
        model.load_dps_state_dict(state, "other")
    with pytest.raises(ConfigError, match="one of"):
        model.load_dps_state_dict(state, "nobody")


def test_the_state_of_other_weights_is_refused(make_model, model, state):
    with torch.no_grad():
        weights_of(model)[1][0, 0] += 1.0
    refused(model, state, r"values of the weight of 'layers.1' are not those")
    refused(
        make_model(variant="mix", sizes=(12, 15, 3)), state, r"'layers.0' is that of a weight with shape \[16, 12\]"
    )
    refused(make_model(variant="mix", sizes=(12, 16, 3, 3)), state, r"lacks \['layers.2'\]")
    refused(make_model(variant="mix", sizes=(12, 16)), state, r"has \['layers.1'\] besides")
    refused(make_model(variant="mix").double(), state, "with dtype torch.float32")


def test_a_state_that_is_damaged_is_refused(model, state):
    def broken(change):
        other = copy.deepcopy(state)
        change(other["header"], other["tensors"])
        return other

    refused(model, broken(lambda header, _: header.update(format=1)), "has format 1")
    refused(model, broken(lambda _, tensors: tensors.pop("layers.1.mask")), r"lacks the tensor 'layers.1.mask'")
    refused(model, broken(lambda _, tensors: tensors.pop("layers.0.snapshot")), r"lacks the tensor 'layers.0.snap")
    refused(model, broken(lambda _, tensors: tensors.update(more=torch.zeros(1))), r"nothing needs: \['more'\]")
    wrong = torch.zeros(2, dtype=torch.uint8)
    refused(
        model, broken(lambda _, tensors: tensors.update({"layers.0.mask": wrong})), r"'layers.0.mask'.* not the one"
    )
    flipped = state["tensors"]["layers.0.mask"] ^ 1
    refused(model, broken(lambda _, tensors: tensors.update({"layers.0.mask": flipped})), r"'layers.0.mask'")
    half = state["tensors"]["layers.0.snapshot"].half()
    refused(model, broken(lambda _, tensors: tensors.update({"layers.0.snapshot": half})), r"'layers.0.snapshot'")
    refused(model, broken(lambda header, _: header["clock"].update(step="3")), "is damaged")
    refused(model, broken(lambda header, _: header["clock"].update(entered="resting")), "is damaged")
    refused(model, broken(lambda header, _: header["clock"].update(schedule={"stage_steps": 0})), "is damaged")
    refused(model, broken(lambda header, _: header["clock"].update(in_round=["nobody"])), "is damaged")
    facts = lambda header: header["weights"]["layers.0"]  # noqa: E731
    refused(model, broken(lambda header, _: facts(header)["facts"].pop("selected")), r"'layers.0'.* lacks 'selected'")
    refused(model, broken(lambda header, _: facts(header).update(rows={})), r"'layers.0'.* lacks the tensor 'mask'")
    refused(model, broken(lambda header, _: header.pop("weights")), "is damaged: it lacks 'weights'")
    refused(model, {"some": "thing"}, "is damaged, or is none")


def test_values_written_from_outside_before_a_save_are_taken_as_they_are(make_model, batches):
    model = make_model()
    train(model, SGD(trainable(model), lr=0.1), batches(3))
    with torch.no_grad():
        weights_of(model)[0].add_(1.0)
    other = make_model()
    other.load_state_dict(model.state_dict())
    other.load_dps_state_dict(model.dps_state_dict())
    assert other.dps_status().frozen_moved
    for each in (model, other):
        train(each, SGD(trainable(each), lr=0.1), batches(1))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(other), strict=True))


def test_layers_that_are_gone_are_not_in_the_state(make_model, batches):
    model = make_model(sizes=(12, 12, 12))
    net = model.base_model.model
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(1))
    net.layers = net.layers[:1]
    state = model.dps_state_dict()
    assert list(state["header"]["weights"]) == ["layers.0"]
    model.load_dps_state_dict(state)
    assert controller_of(model).clock.step == 1


def test_plans_differ_in_more_than_their_names():
    """The comparison above could not fail if the axes did nothing."""
    ends = []
    for plan in (
        Plan(),
        *(replace(Plan(), **change) for change in ({"variant": "mix"}, {"frozen": "gradient"}, {"scope": "model"})),
    ):
        training = Training(plan)
        training.run(6)
        ends.append(training.everything()["weights/base_model.model.0.dps_weight.default"])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ends, 2))
