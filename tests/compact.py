"""A small model with a layer of every kind, for tests of compact storage."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dps import DPSConfig
from peft_dps.selection.granularity import GRANULARITIES, Submatrix
from tests.device import DEVICE

TARGETS = ["embedding", "linear", "transposed", "convolution", "head"]


class EveryLayer(nn.Module):
    """Tokens `[batch, length]` to logits `[batch, 4]`; an activation writes into the output of a target."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=3)
        self.linear = nn.Linear(8, 12)
        self.transposed = Conv1D(10, 12)
        self.convolution = nn.Conv1d(10, 6, 3, padding=1)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu_(self.linear(self.embedding(tokens)))
        hidden = torch.tanh(self.transposed(hidden))
        hidden = torch.relu(self.convolution(hidden.transpose(1, 2))).transpose(1, 2)
        return self.head(hidden).mean(1)


def make_base(dtype: torch.dtype = torch.float64) -> EveryLayer:
    torch.manual_seed(0)
    base = EveryLayer()
    nn.init.normal_(base.transposed.weight, std=0.3)
    return base.to(DEVICE, dtype)


def make_model(base: nn.Module | None = None, **fields):
    size = {} if fields.get("units") is not None else {"density": 0.3}
    fields = {"target_modules": TARGETS, "storage": "compact", "granularity": "column", **size, **fields}
    return get_peft_model(make_base() if base is None else base, DPSConfig(**fields))


def make_batches(count: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        (torch.randint(20, (5, 7), generator=generator), torch.randint(4, (5,), generator=generator))
        for _ in range(count)
    ]
    return [(tokens.to(DEVICE), labels.to(DEVICE)) for tokens, labels in made]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Module]:
    base = model.base_model.model
    return {name: base.get_submodule(name).dps_delta[adapter] for name in TARGETS}


@GRANULARITIES.register("tile")
class Tile(Submatrix):
    """Tiles of a small model's weights, of up to three rows and columns."""

    side = 3
