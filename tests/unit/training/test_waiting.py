"""How often the host waits for an accelerator: once a step or never, however many weights there are.

An accelerator works through what it was told while the host prepares more; a number that the host asks for ends that.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW

from peft_dps import DPSConfig
from peft_dps.tuner.adapter import find_controllers
from tests.compact import Tile
from tests.stand_in import PLACE, stand_in
from tests.unit.conftest import trainable

LAYERS, STAGE, STEPS = (2, 4), 3, 6
COMPACT = {"storage": "compact", "schedule": "every", "score_steps": STAGE, "stage_steps": 2 * STAGE}
METHODS = {
    "dense": {},
    "mix": {"variant": "mix"},
    "mixout": {"noise": "mixout", "schedule": "full"},
    "lean": {"lean": True},
    "gradient": {"frozen": "gradient", "score_dtype": "bfloat16"},
    "absolute": {"score": "absolute_gradient"},
    "rows of the model": {"granularity": "row", "scope": "model"},
    **{
        f"compact {name}": {**COMPACT, "granularity": name}
        for name in ("column", "row", "entry", Tile.__name__.lower())
    },
}


class Training:
    """A training of equal layers, on the CPU or on the stand-in.

    Attributes:
        waits: Per step that neither begins nor ends a phase, where the host waited.
        masked: Whether a mask held in it.
    """

    def __init__(self, layers: int, place: torch.device | None, waits: Counter[str], **fields) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(9, 9), nn.Tanh())))
        names = [str(2 * index) for index in range(layers)]
        config = DPSConfig(**{"target_modules": names, "density": 0.5, "stage_steps": STAGE, **fields})
        self.model = get_peft_model(net, config).to(place)
        optimizer = AdamW(trainable(self.model), lr=1e-2, foreach=True)
        (controller,) = find_controllers(self.model).values()
        x, self.waits, self.masked = torch.linspace(-1, 1, 45).view(5, 9).to(place), [], []
        for _ in range(STEPS):
            waits.clear()
            self.model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            position = controller.clock.position
            if position.step > 1:
                self.waits.append(Counter(waits))
                self.masked.append(position.phase.masked)


@pytest.mark.parametrize("method", METHODS)
def test_waits_do_not_grow_with_the_number_of_weights(method):
    with stand_in() as place:
        few, many = (Training(layers, PLACE, place.waits, **METHODS[method]) for layers in LAYERS)
    assert few.waits == many.waits
    for waits, masked in zip(many.waits, many.masked, strict=True):
        assert waits.total() <= (0 if masked else 1), waits
    here = Training(LAYERS[0], None, Counter(), **METHODS[method])
    ours, theirs = (dict(each.model.named_parameters()) for each in (few, here))
    for name, expected in theirs.items():  # added up in the same order
        torch.testing.assert_close(ours[name].detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_stand_in_notices_what_the_host_waits_for():
    with stand_in() as place:
        x = torch.linspace(-1, 1, 6).to(PLACE)
        assert x.device == PLACE
        for ask in (
            x.sum().item, x.cpu, x.nonzero, x.tolist,
            lambda: bool((x > 0).all()), lambda: x[x > 0], lambda: torch.equal(x, x), lambda: torch.ones(6).to(PLACE),
            lambda: x.copy_(torch.ones(6)), lambda: torch.bincount(x.long().abs()),
        ):  # fmt: skip
            place.waits.clear()
            ask()
            assert place.waits.total() == 1
        place.waits.clear()
        y = torch.zeros(6, device=PLACE) + x * 2.0
        y[x.detach().abs().long()] = 1.0
        y.masked_fill_(y > 0, 3.0)
        assert y.view(2, 3).t().contiguous().device == PLACE
        assert not place.waits
    assert torch.equal(y.held, torch.tensor([3.0, 3.0, -0.4, 0.4, 1.2, 2.0]).where(y.held < 3.0, torch.tensor(3.0)))
