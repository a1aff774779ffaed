"""A recipe's training beside a plain one of the same net, in fp64: step by step, and resumed in the middle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from peft_dps import DPSConfig
from tests.device import DEVICE
from tests.unit.conftest import Net, controller_of, layers_of, trainable

SIZES = (12, 9, 7, 3)
TARGETS = [f"layers.{index}" for index in range(len(SIZES) - 1)]
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
}

Batch = tuple[torch.Tensor, torch.Tensor]


def make_net() -> Net:
    torch.manual_seed(0)
    return Net(SIZES).double().to(DEVICE)


def make_batches(count: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        (torch.randn(8, SIZES[0], generator=generator).double(), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in made]


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    return list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Ours:
    """A model that a recipe trains, with its optimizer."""

    def __init__(self, config: Callable[[], DPSConfig], optimizer: str = "adamw") -> None:
        self.config, self.name = config, optimizer
        self.model = get_peft_model(make_net(), config())
        self.optimizer = OPTIMIZERS[optimizer](trainable(self.model))

    def backward(self, batch: Batch, micro: int = 1) -> None:
        for part in micro_batches(batch, micro):
            (loss_of(self.model, part) / micro).backward()

    def step(self, batch: Batch, micro: int = 1) -> None:
        self.backward(batch, micro)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def resumed(self) -> Ours:
        """Go on in a new model, from what would be saved."""
        other = Ours(self.config, self.name)
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.model.load_dps_state_dict(copy.deepcopy(self.model.dps_state_dict()))
        return other

    @property
    def masks(self) -> list[torch.Tensor | None]:
        """The masks that hold, by weight."""
        return [weight.entry_mask() for weight in controller_of(self.model).weights]


def compare(ours: Ours, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
    for layer, weight, bias in zip(layers_of(ours.model), weights, biases, strict=True):
        torch.testing.assert_close(layer.dps_weight["default"], weight, rtol=0, atol=1e-12, check_dtype=True)
        torch.testing.assert_close(layer.dps_bias["default"], bias, rtol=0, atol=1e-12)


def same(ours: Ours, other: Ours) -> bool:
    """Tell whether two trainings have the same bits."""
    pairs = zip(ours.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)
