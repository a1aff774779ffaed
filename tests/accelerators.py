"""What tests of accelerators have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_dps.training.weight import TargetWeight
from peft_dps.tuner.adapter import find_controllers
from tests.device import DEVICE
from tests.resuming import as_bits, held_by

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def weights_of(model: nn.Module) -> list[TargetWeight]:
    return find_controllers(model)["default"].weights


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that is trained, and of what the phase keeps."""
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for weight in weights_of(model):
        held.update({f"{kind}/{weight.name}": tensor for kind, tensor in held_by(weight).items()})
    return {name: as_bits(tensor).clone() for name, tensor in held.items()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: nn.Module, inputs: torch.Tensor, steps: int, optimizer: torch.optim.Optimizer) -> None:
    """With a loss that makes no tensor of its own."""
    for _ in range(steps):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_engaged(model: nn.Module, steps: int) -> None:
    status = model.dps_status()
    assert (status.steps, status.engaged, status.frozen_moved) == (steps, True, False)


def waits_in(work: Callable[[], object]) -> list[str]:
    """Where in the code torch waited for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in found if "called a synchronizing" in str(each.message)]
