"""Trajectories recorded from the code released with the paper, replayed in a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from peft_dps import DPSConfig

DATA = Path(__file__).parents[1] / "data"


def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def build(recorded: dict[str, torch.Tensor], make_net) -> nn.Module:
    net = make_net()
    for index, layer in enumerate(net.layers):
        layer.load_state_dict({name: recorded[f"init.{index}.{name}"] for name in ("weight", "bias")})
    return net


def test_dense_follows_the_released_code(make_net):
    recorded, about = load("golden_dense_stage4.safetensors")
    net = build(recorded, make_net)
    config = DPSConfig(
        target_modules=["layers.0", "layers.1"],
        density=1 - float(about["sparsity"]),
        stage_steps=int(about["stage_steps"]),
        frozen="gradient",
    )
    model = get_peft_model(net, config)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2, weight_decay=0.01
    )
    masks_compared = 0
    for t, (x, y) in enumerate(zip(recorded["x"], recorded["y"], strict=True)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y.long())
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(recorded[f"step{t}.loss"].item(), abs=1e-6)
        for index, layer in enumerate(net.layers):
            torch.testing.assert_close(
                layer.dps_weight["default"].grad, recorded[f"step{t}.{index}.grad"], rtol=0, atol=1e-6
            )
            for name, container in (("weight", layer.dps_weight), ("bias", layer.dps_bias)):
                torch.testing.assert_close(
                    container["default"].detach(), recorded[f"step{t}.{index}.{name}"], rtol=0, atol=1e-6
                )
            mask = recorded.get(f"step{t}.{index}.mask")
            keep = layer.dps_subnetworks["default"].weights[index].keep
            assert (mask is None) == (keep is None)
            if mask is not None:
                assert torch.equal(keep.bool(), mask.bool())
                masks_compared += 1
    assert masks_compared == 16
