"""Small models of each kind that DPS targets, and one way to train them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from peft_dps import DPSConfig
from tests.device import DEVICE


class MLP(nn.Module):
    """Layers in a list, a norm that is no target, and names that are suffixes of others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "proj": nn.Linear(8, 8, bias=False)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body.layers:
            x = x + layer["proj"](torch.tanh(layer["fc"](x)))
        return self.head(self.norm(x))


class ConvNet(nn.Module):
    """Convolutions over 1, 2 and 3 dimensions, with options of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.first = nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular")
        self.body.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.body.volume = nn.Conv3d(1, 2, (3, 3, 1), padding="same", dilation=(2, 1, 1))
        self.body.line = nn.Conv1d(8, 6, 2, padding=1, dilation=2, groups=2, padding_mode="reflect")
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body.depthwise(torch.tanh(self.body.first(x)))
        x = self.body.volume(x.unsqueeze(1)).sum(1).flatten(2)
        return self.head(self.norm(self.body.line(torch.tanh(x))).mean(-1))


class ScaledEmbedding(nn.Embedding):
    """As several language models have it."""

    def __init__(self, rows: int, dimensions: int, embed_scale: float) -> None:
        super().__init__(rows, dimensions)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class TextNet(nn.Module):
    """Embeddings of words and of places."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.words = nn.Embedding(16, 8, padding_idx=2, scale_grad_by_freq=True)
        self.body.places = ScaledEmbedding(6, 8, embed_scale=1.7)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)
        return self.head(self.norm(torch.tanh(self.body.words(x) + self.body.places(places))))


def make_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def make_gpt2(**options: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **options,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Case:
    """A kind of model with a configuration for it. `base()` gives the same weights each time."""

    name: str
    make: Callable[[], nn.Module]
    inputs: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", self.inputs.to(DEVICE))

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval().to(DEVICE)

    def config(self, **options: Any) -> DPSConfig:
        fields = {"stage_steps": 2, **self.options, **options}
        return DPSConfig(**({} if fields.get("units") is not None else {"density": 0.5}) | fields)

    def model(self, **options: Any) -> PeftModel:
        return get_peft_model(self.base(), self.config(**options)).eval()

    def output(self, model: nn.Module) -> torch.Tensor:
        output = model(self.inputs)
        return getattr(output, "logits", output)

    def train(self, model: nn.Module, steps: int = 1, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move the output towards a fixed target."""
        optimizer = optimizer or self.optimizer(model)
        model.train()
        for _ in range(steps):
            output = self.output(model)
            target = torch.linspace(-1, 1, output.shape[-1], device=output.device).expand_as(output)
            nn.functional.mse_loss(output.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


TOKENS = torch.arange(2, 14).view(2, 6)
FLOATS = torch.linspace(-2, 2, 32).view(4, 8)
CASES = [
    Case("mlp", MLP, FLOATS, {"target_modules": ["fc", "proj"], "modules_to_save": ["head"]}),
    Case("bert", make_bert, TOKENS, {"task_type": "SEQ_CLS"}),
    Case("gpt2", make_gpt2, TOKENS, {"task_type": "CAUSAL_LM"}),
    Case(
        "conv",
        ConvNet,
        torch.linspace(-2, 2, 288).view(2, 4, 6, 6).sin(),
        {"target_modules": ["first", "depthwise", "volume", "line"], "modules_to_save": ["head"]},
    ),
    Case("text", TextNet, TOKENS, {"target_modules": ["words", "places"], "modules_to_save": ["head"]}),
]


def input_of(layer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Something that a DPS layer can take."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return torch.arange(5, device=DEVICE).view(1, 5)
    space = [6] * len(base.kernel_size) if hasattr(base, "kernel_size") else []
    return torch.randn(2, layer.in_features, *space, dtype=dtype, device=DEVICE)


@pytest.fixture(name="input_of")
def _input_of() -> Callable[..., torch.Tensor]:
    return input_of


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=CASES[1:3], ids=lambda case: case.name)
def transformer(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def mlp() -> Case:
    return CASES[0]


@pytest.fixture
def bert() -> Case:
    return CASES[1]


@pytest.fixture
def gpt2() -> Case:
    return CASES[2]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


Snapshot = Callable[[nn.Module], dict[str, torch.Tensor]]


@pytest.fixture
def snapshot() -> Snapshot:
    """Copies of a model's parameters and buffers by name."""
    return lambda model: {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def untied_gpt2() -> Case:
    return Case("untied", lambda: make_gpt2(tie_word_embeddings=False), TOKENS, {"task_type": "CAUSAL_LM"})


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process, whose GPU is `DEVICE`."""
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
