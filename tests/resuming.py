"""A small training that can be stopped, saved and resumed, also by a new process: `python -m tests.resuming DIR`.

The folder holds trainings that were stopped, each in a folder of its own; each is resumed and its end written there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import SGD, AdamW

from peft_dps import DPSConfig
from peft_dps.training.weight import TargetWeight
from peft_dps.tuner.adapter import find_controllers
from tests.device import DEVICE, ON_CPU

OPTIMIZERS = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    variant: str = "dense"
    frozen: str = "exact"
    scope: str = "tensor"
    score: str = "squared_gradient"
    score_dtype: str = "float32"
    optimizer: str = "adamw"
    micro_batches: int = 1
    density: float = 0.4
    stage_steps: int = 3
    steps: int = 14
    lean: bool = False
    granularity: str = "entry"
    schedule: str = "cycle"
    evidence: str | None = None


class Training:
    """A net of two targeted layers with dropout between them, random data, and an optimizer."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 17), nn.Dropout(0.1), nn.Tanh(), nn.Linear(17, 3)).to(DEVICE)
        names = ("variant", "frozen", "scope", "score", "score_dtype", "density", "stage_steps", "lean")
        names += ("granularity", "schedule", "evidence")
        fields = {name: getattr(plan, name) for name in names}
        if plan.schedule != "cycle":
            fields["score_steps"] = plan.stage_steps
        config = DPSConfig(target_modules=["0", "3"], **fields)
        self.model = get_peft_model(net, config).train()
        self.optimizer = OPTIMIZERS[plan.optimizer]([p for p in self.model.parameters() if p.requires_grad])
        self.forward: nn.Module = self.model  # or what wraps it
        self.share = slice(None)  # of each batch
        self.step = 0

    def run(self, until: int) -> None:
        """Make steps up to and including the one of that number."""
        while self.step < until:
            for micro in range(self.plan.micro_batches):
                generator = torch.Generator().manual_seed(1000 * self.step + micro)
                x, y = torch.randn(8, 12, generator=generator), torch.randint(3, (8,), generator=generator)
                x, y = x.to(DEVICE), y.to(DEVICE)
                nn.functional.cross_entropy(self.forward(x[self.share]), y[self.share]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def trace(self) -> list[dict[str, torch.Tensor]]:
        """Run to the end, and take down everything after every step."""
        states = []
        while self.step < self.plan.steps:
            self.run(self.step + 1)
            states.append(self.everything())
        return states

    def everything(self) -> dict[str, torch.Tensor]:
        """Weights, and all that DPS holds, as bits."""
        state = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for weight in find_controllers(self.model)["default"].weights:
            for kind, tensor in held_by(weight).items():
                if not (kind == "total" and self.plan.lean):  # a matter of when it is made
                    state[f"{kind}/{weight.name}"] = tensor
        return {name: as_bits(tensor).clone() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(self.model.state_dict(), folder / "weights.safetensors")
        torch.save({"optimizer": self.optimizer.state_dict(), "random": random_state()}, folder / "rest.pt")
        self.model.save_dps_state(folder / "dps.safetensors")
        (folder / "plan.json").write_text(json.dumps({**asdict(self.plan), "stopped": self.step}))

    @classmethod
    def resumed(cls, folder: Path) -> Training:
        fields = json.loads((folder / "plan.json").read_text())
        step = fields.pop("stopped")
        training = cls(Plan(**fields))
        training.step = step
        training.model.load_state_dict(load_file(folder / "weights.safetensors"))
        rest = torch.load(folder / "rest.pt", weights_only=True)
        training.optimizer.load_state_dict(rest["optimizer"])
        training.model.load_dps_state(folder / "dps.safetensors")
        set_random_state(rest["random"])
        return training


def random_state() -> torch.Tensor:
    """State of the generator that dropout draws from."""
    return torch.get_rng_state() if ON_CPU else torch.get_device_module(DEVICE).get_rng_state()


def set_random_state(state: torch.Tensor) -> None:
    (torch.set_rng_state if ON_CPU else torch.get_device_module(DEVICE).set_rng_state)(state)


def held_by(weight: TargetWeight) -> dict[str, torch.Tensor]:
    """All that the phase keeps of a weight."""
    frozen = weight.frozen
    held = {
        "total": getattr(weight.gathered, "total", None),
        "participation": getattr(weight.noise, "count", None),
        "keep": None if frozen is None else frozen.mask.keep,
        "held": getattr(frozen, "held", None),
        "snapshot": getattr(frozen, "snapshot", None),
        # The optimizer may move what the policy "gradient" freezes, and a resumed training adds it up anew.
        "checksum": getattr(frozen, "checksum", None) if getattr(frozen, "holds_bits", False) else None,
    }
    return {kind: tensor for kind, tensor in held.items() if tensor is not None}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.element_size()]) if tensor.is_floating_point() else tensor.detach()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    different = [name for name in ours if not torch.equal(ours[name].cpu(), theirs[name].cpu())]
    assert not different, different


if __name__ == "__main__":
    for stopped in sorted(Path(sys.argv[1]).iterdir()):
        continued = Training.resumed(stopped)
        continued.run(continued.plan.steps)
        save_file(continued.everything(), stopped / "end.safetensors")
