from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSConfig
from peft_dps.training.controller import Controller
from peft_dps.training.weight import TargetWeight
from tests.device import DEVICE


class Net(nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self, sizes: tuple[int, ...] = (12, 16, 3)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_net():
    def make(seed: int = 0, sizes: tuple[int, ...] = (12, 16, 3)) -> Net:
        torch.manual_seed(seed)
        return Net(sizes).to(DEVICE)

    return make


@pytest.fixture
def make_model(make_net):
    """Build a DPS model of a small net; every keyword goes to DPSConfig."""

    def make(net_seed: int = 0, sizes: tuple[int, ...] = (12, 16, 3), **fields):
        names = [f"layers.{index}" for index in range(len(sizes) - 1)]
        config = DPSConfig(**{"target_modules": names, "stage_steps": 2, "density": 0.5, **fields})
        return get_peft_model(make_net(net_seed, sizes), config)

    return make


@pytest.fixture
def batches():
    """The same random batches for everyone who asks."""

    def make(count: int, seed: int = 1, features: int = 12, classes: int = 3):
        generator = torch.Generator().manual_seed(seed)
        made = [
            (torch.randn(8, features, generator=generator), torch.randint(classes, (8,), generator=generator))
            for _ in range(count)
        ]
        return [(x.to(DEVICE), y.to(DEVICE)) for x, y in made]

    return make


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.base_model.model.layers)


def weights_of(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    return [layer.dps_weight[adapter] for layer in layers_of(model)]


def controller_of(model: nn.Module, adapter: str = "default") -> Controller:
    return layers_of(model)[0].dps_controllers[adapter]


def keep_of(weight: TargetWeight) -> torch.Tensor | None:
    """The mask that holds, in bytes; None where none does."""
    return None if weight.frozen is None else weight.frozen.mask.keep


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
