"""A small decoder, and methods in plain torch that train some of its weights at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig, dps_adapter
from tests.device import DEVICE

LAYERS = 4
WIDTH = 6
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TARGETS = [f"layers.{number}.{part}" for number in range(LAYERS) for part in (*ATTENTION, *FEED_FORWARD)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name[10:]: nn.Linear(WIDTH, WIDTH) for name in ATTENTION})
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(WIDTH, 10),
                "up_proj": nn.Linear(WIDTH, 10),
                "down_proj": nn.Linear(10, WIDTH),
            }
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention, mlp, y = self.self_attn, self.mlp, self.norm(x)
        weights = (attention["q_proj"](y) @ attention["k_proj"](y).mT).softmax(-1)
        x = x + attention["o_proj"](weights @ attention["v_proj"](y))
        return x + mlp["down_proj"](torch.sigmoid(mlp["gate_proj"](x)) * mlp["up_proj"](x))


class Decoder(nn.Module):
    """Tokens `[batch, length]` to logits `[batch, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x)).mean(1)


def make_net() -> Decoder:
    torch.manual_seed(0)
    return Decoder().double().to(DEVICE)


def micro_batches(step: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    made = [
        (torch.randint(11, (4, 5), generator=generator), torch.randint(5, (4,), generator=generator))
        for _ in range(count)
    ]
    return [(tokens.to(DEVICE), labels.to(DEVICE)) for tokens, labels in made]


def loss_of(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def make_step(net: nn.Module, optimizer: torch.optim.Optimizer, batches) -> None:
    for batch in batches:
        (loss_of(net, batch) / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


class Plain:
    """A decoder of which some weights are trained at a time, and others always."""

    def __init__(self, always: bool) -> None:
        self.net = make_net().requires_grad_(False)
        self.optimizer = AdamW(self.net.parameters(), lr=1e-2, weight_decay=0.1)
        self.chosen: set[str] = set()
        for path, module in self.net.named_modules():
            if always and path not in TARGETS:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)

    def choose(self, chosen: set[str]) -> None:
        """Train these weights. Those that leave lose their optimizer state, those that enter begin without."""
        for name in TARGETS:
            weight = self.net.get_submodule(name).weight
            weight.requires_grad_(name in chosen)
            if name not in chosen:
                self.optimizer.state.pop(weight, None)
        self.chosen = set(chosen)

    def squares(self, batches) -> dict[str, float]:
        """Squared gradients of all targets, added up over entries and passes."""
        net = make_net()
        net.load_state_dict(self.net.state_dict())
        weights = [net.get_submodule(name).weight for name in TARGETS]
        found = dict.fromkeys(TARGETS, 0.0)
        for batch in batches:
            gradients = torch.autograd.grad(loss_of(net, batch) / len(batches), weights)
            for name, gradient in zip(TARGETS, gradients, strict=True):
                found[name] += float(gradient.square().sum())
        return found


def make_model(config: DPSConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    config.target_modules = set(TARGETS)  # of a model that is none of transformers, "all-linear" takes the head too
    model = get_peft_model(make_net(), config)
    return model, optimizer_of(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    own = [p for name, p in model.named_parameters() if "dps_delta" in name or "modules_to_save.default" in name]
    return AdamW(own, lr=1e-2, weight_decay=0.1)


def selected(model: nn.Module) -> set[str]:
    """The weights that are trained now."""
    return {name for name, mask in dps_adapter(model).masks().items() if mask.all()}


def weights_of(layers: set[int]) -> set[str]:
    return {name for name in TARGETS if int(name.split(".")[1]) in layers}


def layers_of(weights: set[str]) -> set[int]:
    return {int(name.split(".")[1]) for name in weights}


def resumed(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path):
    """Save a training, and go on with another model."""
    model.save_pretrained(folder)
    model.save_dps_state(folder / "dps.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    loaded = PeftModel.from_pretrained(make_net(), folder, is_trainable=True).train()
    again = optimizer_of(loaded)
    loaded.load_dps_state(folder / "dps.safetensors")
    again.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return loaded, again


def follow(
    config: DPSConfig, choose, *, always: bool, steps: int, micro: int, resume_after: int, folder: Path
) -> None:
    """Train with a recipe and in plain torch, and compare all weights after each step.

    Args:
        config: What the recipe returned.
        choose: Called after a step of the recipe with what is plain, the number of the step, its micro-batches and the
            weights that the recipe trains in it; calls `Plain.choose`.
        always: Whether what is no target is trained from beginning to end.
        steps: Number of steps.
        micro: Micro-batches of a step.
        resume_after: Step after which the training is saved and resumed.
        folder: Where to.
    """
    plain, (model, optimizer) = Plain(always), make_model(config)
    for step in range(1, steps + 1):
        batches = micro_batches(step, micro)
        make_step(model, optimizer, batches)
        choose(plain, step, batches, selected(model))
        if always or plain.chosen:
            make_step(plain.net, plain.optimizer, batches)
        assert selected(model) == plain.chosen, step
        model.eval()  # a look at a weight in training mode would begin the next phase
        for name, module in model.base_model.model.named_modules():
            if name in TARGETS or (always and name in ("embed_tokens", "norm", "lm_head", "layers.1.norm")):
                ours = getattr(module, "modules_to_save", {"default": module})["default"].weight
                expected = plain.net.get_submodule(name).weight
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10, msg=f"{name}, step {step}")
        model.train()
        if step == resume_after:
            model, optimizer = resumed(model, optimizer, folder)
