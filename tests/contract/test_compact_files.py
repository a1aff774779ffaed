"""Compact adapters as files: saved, loaded, resumed at any step, and refused if damaged."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from peft_dps.errors import AdapterFileError, StateError
from tests.compact import deltas_of, make_base, make_batches, make_model, train, trainable

STEPS = 9
EVERY = {"score_steps": 2, "stage_steps": 4}
KINDS = [
    ("column", "tensor"), ("row", "tensor"), ("entry", "tensor"), ("column", "model"), ("entry", "model"),
    ("tensor", "model"), ("block", "model"),
]  # fmt: skip


def own_tensors(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "dps_" in name}


@pytest.mark.parametrize("schedule", ["once", "every", "cycle"])
@pytest.mark.parametrize(("granularity", "scope"), KINDS)
def test_it_resumes_at_any_step_to_the_bit(tmp_path, granularity, scope, schedule):
    batches = make_batches(STEPS)
    fields = {"granularity": granularity, "scope": scope, "schedule": schedule, **EVERY}
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
