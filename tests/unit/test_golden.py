"""Trajectories recorded from the code released with the paper, replayed in a plain loop."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig
from peft_dps.masking.noise import ColumnNoise
from tests.device import DEVICE, ON_CPU

pytestmark = pytest.mark.device

# Comparisons per kind of tensor, so that a file read wrongly cannot pass.
EXPECTED = {
    ("dense", 4): {"weight": 40, "bias": 40, "grad": 40, "mask": 16},
    ("mix", 4): {"weight": 40, "bias": 40, "grad": 40, "mask": 16},
    ("mix", 50): {"weight": 16, "bias": 16, "grad": 16, "mask": 6},
}

TOLERANCE = 1e-6 if ON_CPU else 1e-5  # recorded on a CPU; a GPU adds up in another order

DATA = Path(__file__).parents[1] / "data"


def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key).to(DEVICE) for key in file.keys()}, file.metadata()  # noqa: SIM118


def build(recorded: dict[str, torch.Tensor], make_net) -> nn.Module:
    net = make_net()
    for index, layer in enumerate(net.layers):
        layer.load_state_dict({name: recorded[f"init.{index}.{name}"] for name in ("weight", "bias")})
    return net


def frozen_of(layer: nn.Module, index: int) -> torch.Tensor | None:
    frozen = layer.dps_controllers["default"].weights[index].frozen
    return None if frozen is None else frozen.mask.keep


@pytest.mark.parametrize(("variant", "stage_steps"), EXPECTED)
def test_training_follows_the_released_code(make_net, monkeypatch, variant, stage_steps):
    recorded, about = load(f"golden_{variant}_stage{stage_steps}.safetensors")
    assert int(about["stage_steps"]) == stage_steps

    def replay(self, step, columns, device):
        return tuple(
            recorded[f"step{step - 1}.{index}.noise"].reshape(-1, size)[0].bool() for index, size in enumerate(columns)
        )

    monkeypatch.setattr(ColumnNoise, "draw", replay)
    net = build(recorded, make_net)
    model = get_peft_model(
        net,
        DPSConfig(
            variant=variant,
            target_modules=["layers.0", "layers.1"],
            density=1 - float(about["sparsity"]),
            stage_steps=stage_steps,
            frozen="gradient",
        ),
    )
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    compared = Counter()
    for t, (x, y) in enumerate(zip(recorded["x"], recorded["y"], strict=True)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y.long())
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(recorded[f"step{t}.loss"].item(), abs=TOLERANCE)
        for index, layer in enumerate(net.layers):
            now = {
                "weight": layer.dps_weight["default"].detach(),
                "bias": layer.dps_bias["default"].detach(),
                "grad": layer.dps_weight["default"].grad,
                "mask": frozen_of(layer, index),
            }
            for name, value in now.items():
                expected = recorded.get(f"step{t}.{index}.{name}")
                if expected is None:
                    continue
                compared[name] += 1
                if name == "mask":
                    assert torch.equal(value.bool(), expected.bool())
                else:
                    torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE)
    assert compared == EXPECTED[variant, stage_steps]
