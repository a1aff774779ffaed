"""Trainings of every kind of model resume from an adapter saved by PEFT and the training state beside it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_dps.tuner.adapter import find_controllers
from tests.resuming import as_bits, assert_same

pytestmark = pytest.mark.device

STEPS = pytest.mark.parametrize("steps", [0, 1, 3, 4, 5], ids=lambda steps: f"step {steps}")


def everything(model):
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for weight in find_controllers(model)["default"].weights:
        parts = vars(weight.gathered) | vars(weight.noise) | (vars(weight.frozen) if weight.frozen else {})
        for kind in ("total", "count", "held", "snapshot"):
            if parts.get(kind) is not None:
                held[f"{kind}/{weight.name}"] = parts[kind]
        if weight.frozen:
            held[f"mask/{weight.name}"] = weight.frozen.mask.keep
    return {name: as_bits(tensor).clone() for name, tensor in held.items()}


@pytest.mark.supports("Training", "resuming to the bit, at any step (`save_dps_state`, `load_dps_state`)")
@STEPS
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_a_loaded_adapter_goes_on_with_its_training_state(case, tmp_path, steps, variant):
    model = case.model(variant=variant)
    optimizer = case.optimizer(model)
    case.train(model, steps, optimizer)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_dps_state(tmp_path / "dps.safetensors")

    resumed = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    its_optimizer = case.optimizer(resumed)
    its_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    resumed.load_dps_state(tmp_path / "dps.safetensors")
    assert resumed.dps_status() == model.dps_status()
    assert_same(everything(resumed), everything(model))
    for _ in range(4):
        case.train(model, 1, optimizer)
        case.train(resumed, 1, its_optimizer)
        assert_same(everything(resumed), everything(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_other_dtypes_resume_too(gpt2, tmp_path, dtype, frozen):
    def make():
        config = gpt2.config(variant="mix", frozen=frozen)
        return get_peft_model(gpt2.base().to(dtype), config, autocast_adapter_dtype=False)

    for steps in (1, 3):
        model, resumed = make(), make()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        gpt2.train(model, steps, optimizer)
        resumed.load_state_dict(model.state_dict())
        model.save_dps_state(tmp_path / "dps.safetensors")
        resumed.load_dps_state(tmp_path / "dps.safetensors")
        its_optimizer = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.1)
        gpt2.train(model, 3, optimizer)
        gpt2.train(resumed, 3, its_optimizer)
        assert_same(everything(resumed), everything(model))


def test_each_adapter_has_a_state_of_its_own(mlp, tmp_path):
    model = mlp.model()
    model.add_adapter("second", mlp.config(density=0.25))
    mlp.train(model, 3)
    model.set_adapter("second")
    mlp.train(model, 1)
    for name, steps in (("default", 3), ("second", 1)):
        model.save_dps_state(tmp_path / name, name)
        model.set_dps_total_steps(9, name)
        assert model.dps_status(name).steps == 0
        model.load_dps_state(tmp_path / name, name)
        assert model.dps_status(name).steps == steps
