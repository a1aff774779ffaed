"""Compact adapters as files: saved, loaded, resumed at any step, and refused if damaged."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig
from peft_dps.errors import AdapterFileError, StateError
from tests.compact import deltas_of, loss_of, make_base, make_batches, make_model, train, trainable

STEPS = 9
EVERY = {"score_steps": 2, "stage_steps": 4}
KINDS = [
    ("column", "tensor"), ("row", "tensor"), ("entry", "tensor"), ("column", "model"), ("entry", "model"),
    ("tensor", "model"), ("block", "model"), ("tile", "tensor"),
]  # fmt: skip


def own_tensors(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "dps_" in name}


@pytest.mark.parametrize("schedule", ["once", "every", "cycle"])
@pytest.mark.parametrize(("granularity", "scope"), KINDS)
def test_it_resumes_at_any_step_to_the_bit(tmp_path, granularity, scope, schedule):
    batches = make_batches(STEPS)
    lengths = {"stage_steps": 4} if schedule == "cycle" else EVERY
    fields = {"granularity": granularity, "scope": scope, "schedule": schedule, **lengths}
    whole = make_model(**fields)
    optimizer = AdamW(trainable(whole), 1e-2)
    for step in range(1, STEPS):
        train(whole, optimizer, batches[step - 1 : step])
        whole.save_pretrained(tmp_path / str(step))
        whole.base_model.save_dps_state(tmp_path / str(step) / "state.safetensors")
        torch.save(optimizer.state_dict(), tmp_path / str(step) / "optimizer.pt")
    train(whole, optimizer, batches[STEPS - 1 :])
    expected = own_tensors(whole)
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        resumed = PeftModel.from_pretrained(make_base(), folder, is_trainable=True).train()
        resumed.base_model.load_dps_state(folder / "state.safetensors")
        again = AdamW([parameter for name, parameter in resumed.named_parameters() if "dps_" in name], 1e-2)
        again.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        train(resumed, again, batches[step:])
        found = own_tensors(resumed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"resumed after step {step}"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_computes_the_same(tmp_path, low_cpu_mem_usage):
    model = make_model(schedule="every", **EVERY)
    train(model, AdamW(trainable(model), 1e-1), make_batches(11))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    tokens = make_batches(1)[0][0]
    assert torch.equal(loaded.eval()(tokens), model.eval()(tokens))
    assert any(delta.kept is not None for delta in deltas_of(loaded).values())


def test_a_file_holds_values_and_indices_alone(tmp_path):
    model = make_model(schedule="once", score_steps=1, train_bias=False)
    train(model, AdamW(trainable(model), 1e-1), make_batches(3))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    held = sum(delta.weight.numel() * 8 + delta.slots * 4 for delta in deltas_of(model).values())
    assert sum(tensor.nbytes for tensor in tensors.values()) == held


def test_merging_and_unmerging_are_exact():
    model = make_model(schedule="once", score_steps=1)
    train(model, AdamW(trainable(model), 1e-1), make_batches(4))
    tokens = make_batches(1)[0][0]
    model.eval()
    before, base = model(tokens), make_base().requires_grad_(False)(tokens)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens), before, rtol=1e-12, atol=1e-14)
    model.unmerge_adapter()
    assert torch.equal(model(tokens), before)
    with model.disable_adapter():
        assert torch.equal(model(tokens), base)
    assert not torch.equal(before, base)


DAMAGE = {
    "a unit that the layer lacks": lambda index: index.fill_(99),
    "a unit twice": lambda index: index.fill_(1),
    "some units missing": lambda index: index.index_fill_(0, torch.tensor([0]), -1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_indices_that_cannot_be_are_refused(tmp_path, damage):
    model = make_model(schedule="once", score_steps=1)
    train(model, AdamW(trainable(model), 1e-1), make_batches(3))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    DAMAGE[damage](tensors["base_model.model.linear.dps_delta.index"])
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match=r"'base_model.model.linear.dps_delta.default' does not fit .*`index`"):
        PeftModel.from_pretrained(make_base(), tmp_path)


def test_a_refused_load_leaves_the_adapter_as_it_was(tmp_path):
    model = make_model(schedule="every", **EVERY)
    train(model, AdamW(trainable(model), 1e-1), make_batches(11))
    model.save_pretrained(tmp_path)
    tokens, before = make_batches(1)[0][0], own_tensors(model)
    expected = model.eval()(tokens)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.head.dps_delta.index"] = tensors["base_model.model.head.dps_delta.index"].long()
    with pytest.raises(AdapterFileError, match="has to be a list of int32"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(value, before[name]) for name, value in own_tensors(model).items())
    assert torch.equal(model(tokens), expected)


def test_a_load_that_is_refused_for_its_head_leaves_the_units_as_they_were(tmp_path):
    def classifier(classes):
        return get_peft_model(
            nn.Sequential(OrderedDict(body=nn.Linear(8, 8), head=nn.Linear(8, classes))),
            DPSConfig.compact(classes, target_modules=["body"], modules_to_save=["head"], init_weights=False),
        ).eval()

    classifier(3).save_pretrained(tmp_path)
    model, x = classifier(2), torch.randn(4, 8)
    before = model(x)
    with pytest.raises(AdapterFileError, match="size mismatch"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(x), before)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert "_restore_units" not in model.base_model.__dict__


def test_evidence_of_micro_batches_survives_a_resume_before_units_have_their_number(tmp_path):
    fields = {"scope": "model", "schedule": "once", "score_steps": 4, "train_bias": False}
    batches = make_batches(8)

    def steps(model, optimizer, numbers):
        for number in numbers:
            for batch in batches[2 * number : 2 * number + 2]:
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = make_model(**fields)
    optimizer = AdamW(trainable(whole), 1e-2)
    steps(whole, optimizer, range(2))
    whole.save_pretrained(tmp_path)
    whole.base_model.save_dps_state(tmp_path / "state.safetensors")
    steps(whole, optimizer, range(2, 4))
    resumed = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).train()
    resumed.base_model.load_dps_state(tmp_path / "state.safetensors")
    steps(resumed, AdamW(trainable(resumed), 1e-2), range(2, 4))
    ours, theirs = (model.base_model.dps_state_dict()["tensors"] for model in (resumed, whole))
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_that_come_and_go_look_up_tokens_of_their_own(tmp_path):
    fields = {"target_modules": ["embedding"], "granularity": "row", "units": 5, "schedule": "once", "score_steps": 1}
    expected = {}
    tokens = torch.arange(20).view(4, 5)
    for seed in (1, 2):
        model = make_model(**fields)
        train(model, AdamW(trainable(model), 1e-1), make_batches(3, seed))
        model.save_pretrained(tmp_path / str(seed))
        expected[seed] = model.eval()(tokens)
    model = make_model(**fields).eval()
    for seed in [1, 2] * 8:
        model.load_adapter(tmp_path / str(seed), "other")
        model.set_adapter("other")
        assert torch.equal(model(tokens), expected[seed])
        model.set_adapter("default")
        model.delete_adapter("other")


def test_a_state_of_other_units_is_refused(tmp_path):
    model = make_model(schedule="once", score_steps=1)
    optimizer = AdamW(trainable(model), 0.0)
    train(model, optimizer, make_batches(3))
    model.base_model.save_dps_state(tmp_path / "state.safetensors")
    with torch.no_grad():
        index = deltas_of(model)["linear"].index
        index.copy_((index + 1) % 8)
    with pytest.raises(StateError, match="other units"):
        model.base_model.load_dps_state(tmp_path / "state.safetensors")
