"""Selective fine-tuning as plain slow code, for methods that select once: whole weights, masks, loops over entries.

`Selective` knows nothing of PEFT or hooks. `follow` and `resume` train by a recipe and compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.device import DEVICE

STEPS = 6
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Block(nn.Module):
    """Linear layers under the names that LLaMA has for them."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            inputs, outputs = {"up_proj": (8, 12), "down_proj": (12, 8)}.get(name, (8, 8))
            setattr(self, name, nn.Linear(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(torch.tanh(self.q_proj(x)) * torch.sigmoid(self.k_proj(x)) + self.v_proj(x))
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double().to(DEVICE)


def make_batches(count: int, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [
        (
            torch.randn(size, 8, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in made]


def loss_of(net: nn.Module, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def indices_of(weight: torch.Tensor) -> list[tuple[int, ...]]:
    return list(product(*map(range, weight.shape)))


def best(scores: dict, count: int) -> set:
    """The names of the best scores; of equal ones those that come first."""
    order = {name: place for place, name in enumerate(scores)}
    return set(sorted(scores, key=lambda name: (-scores[name], order[name]))[:count])


class Selective:
    """Trains a net of which, once something is selected, only some entries are updated.

    Args:
        net: It.
        names: Names of the layers whose weights are selected from.
        scored: Steps that are scored in training, and train none of these weights.
        select: Sums of what is gathered, per name -> masks, per name. None for masks that come from elsewhere.
        gather: What is gathered of each entry of the gradient of one backward pass.
        decays: Whether the optimizer is AdamW with weight decay, which moves frozen entries too.
        others: Whether all other parameters are trained.
    """

    def __init__(
        self,
        net: nn.Module,
        names: list[str],
        *,
        scored: int = 0,
        select: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        gather: Callable[[torch.Tensor], torch.Tensor] = torch.abs,
        decays: bool = False,
        others: bool = False,
    ) -> None:
        self.net, self.scored, self.select, self.gather = net, scored, select, gather
        self.weights = {name: net.get_submodule(name).weight for name in names}
        self.sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.masks: dict[str, torch.Tensor] = {}
        self.decays, self.step = decays, 0
        trained = list(net.parameters()) if others else list(self.weights.values())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1 if decays else 0.0)

    def score(self, batch) -> None:
        """Gather from the gradients of one backward pass."""
        self.net.zero_grad()
        loss_of(self.net, batch).backward()
        for name, weight in self.weights.items():
            for index in indices_of(weight):
                self.sums[name][index] += self.gather(weight.grad[index])

    def train(self, micro_batches) -> None:
        """Make one step."""
        self.step += 1
        if self.step <= self.scored:
            for batch in micro_batches:
                self.score(batch)
            return
        if not self.masks:
            self.masks = self.select(self.sums)
        self.net.zero_grad()
        for batch in micro_batches:
            loss_of(self.net, batch).backward()
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        for name, index in self.frozen():
            self.weights[name].grad[index] = 0.0
        self.optimizer.step()
        for name, index in () if self.decays else self.frozen():
            self.weights[name].data[index] = before[name][index]

    def frozen(self) -> list[tuple[str, tuple[int, ...]]]:
        """The entries that are left out."""
        every = [(name, index) for name, weight in self.weights.items() for index in indices_of(weight)]
        return [(name, index) for name, index in every if not self.masks[name][index]]


def best_entries_of_each(density: float | None = None, count: int | None = None):
    """Select so many entries of each weight."""

    def select(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {}
        for name, total in sums.items():
            many = count or math.ceil(density * total.numel())
            chosen = best({index: float(total[index]) for index in indices_of(total)}, many)
            masks[name] = mask_of(total, lambda index, chosen=chosen: index in chosen)
        return masks

    return select


def best_of_all(density: float, unit: Callable[[tuple[int, ...]], object] = lambda index: index):
    """Select the best units of all weights, by the mean of their entries, until their entries are enough."""

    def select(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict = {}
        for name, total in sums.items():
            for index in indices_of(total):
                found.setdefault((name, unit(index)), []).append(float(total[index]))
        means = {key: sum(entries) / len(entries) for key, entries in found.items()}
        limit, taken, chosen = math.ceil(density * sum(map(len, found.values()))), 0, set()
        for key in sorted(means, key=lambda key: (-means[key], list(means).index(key))):
            if taken >= limit:
                break
            chosen.add(key)
            taken += len(found[key])
        return {
            name: mask_of(total, lambda index, name=name: (name, unit(index)) in chosen)
            for name, total in sums.items()
        }

    return select


def follow(config, reference: Selective, before, after=lambda _: None, micro_batches: int = 2) -> nn.Module:
    """Train a net by a recipe, with gradient accumulation, and compare it with the reference after every step.

    Args:
        config: What the recipe has made.
        reference: The reference, of a net of the same weights.
        before: Is given the PEFT model before the first step.
        after: Is given the PEFT model after every step, before the reference makes it.
        micro_batches: Backward passes of a step.
    """
    model = get_peft_model(make_net(), config)
    before(model)
    optimizer, batches = make_optimizer(model, reference.decays), make_batches(STEPS * micro_batches)
    for step in range(STEPS):
        own = batches[step * micro_batches : (step + 1) * micro_batches]
        make_step(model, optimizer, own)
        after(model)
        reference.train(own)
        for name, weight in reference.weights.items():
            found = model.base_model.model.get_submodule(name).weight
            torch.testing.assert_close(
                found, weight, rtol=0, atol=1e-12, msg=lambda text, at=(step, name): f"{at}: {text}"
            )
    assert any(
        not torch.equal(reference.weights[name], make_net().get_submodule(name).weight) for name in reference.weights
    )
    return model


def resume(config, folder, before, decays: bool = False, stops=(1, 3)) -> None:
    """Stop a training by a recipe, go on from files, and compare the end bit for bit."""
    batches, model = make_batches(STEPS), get_peft_model(make_net(), config)
    before(model)
    optimizer = make_optimizer(model, decays)
    for step, batch in enumerate(batches, 1):
        make_step(model, optimizer, [batch])
        if step in stops:
            model.save_pretrained(folder / str(step))
            model.save_dps_state(folder / str(step) / "state.safetensors")
            torch.save(optimizer.state_dict(), folder / str(step) / "optimizer.pt")
    for stop in stops:
        at = folder / str(stop)
        resumed = PeftModel.from_pretrained(make_net(), at, is_trainable=True).train()
        again = make_optimizer(resumed, decays)
        again.load_state_dict(torch.load(at / "optimizer.pt", weights_only=True))
        resumed.load_dps_state(at / "state.safetensors")
        for batch in batches[stop:]:
            make_step(resumed, again, [batch])
        ours, theirs = model.state_dict(), resumed.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), f"resumed after step {stop}"


def make_optimizer(model: nn.Module, decays: bool) -> torch.optim.Optimizer:
    own = [value for name, value in model.named_parameters() if "dps_" in name or "modules_to_save" in name]
    return torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1 if decays else 0.0)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches) -> None:
    optimizer.zero_grad()
    for batch in micro_batches:
        loss_of(model, batch).backward()
    optimizer.step()


def mask_of(weight: torch.Tensor, holds: Callable[[tuple[int, ...]], bool]) -> torch.Tensor:
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for index in indices_of(weight):
        mask[index] = holds(index)
    return mask.to(weight.device)
