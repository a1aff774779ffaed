"""GreenTrainer does what plain torch does by its paper's description."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from peft_dps.errors import ConfigError
from peft_dps.recipes import greentrainer
from tests.device import DEVICE
from tests.unit.recipes.decoder import LAYERS, TARGETS, follow, make_model, make_net, selected

pytestmark = pytest.mark.device


def best_set(importance: dict[str, float], limit: float) -> set[str]:
    """Try the sets by their lowest weight; above it a knapsack of few sizes is filled in every way."""
    net = make_net()
    size = {name: net.get_submodule(name).weight.numel() for name in TARGETS}
    best, chosen = -1.0, set()
    for place, lowest in enumerate(TARGETS):
        above = TARGETS[place + 1 :]
        left = limit - size[lowest] - sum(size[name] for name in above)
        if left < 0:
            continue
        kinds = [[name for name in above if size[name] == each] for each in sorted(set(size.values()))]
        ranked = [sorted(kind, key=importance.__getitem__, reverse=True) for kind in kinds]
        for first in range(len(ranked[0]) + 1):
            for second in range(len(ranked[1]) + 1):
                names = {lowest, *ranked[0][:first], *ranked[1][:second]}
                if sum(size[name] for name in names - {lowest}) <= left:
                    total = sum(importance[name] for name in names)
                    if total > best:
                        best, chosen = total, names
    return chosen


@pytest.mark.parametrize(("micro", "rho"), [(1, 0.4), (2, 0.5), (1, 0.75)])
def test_greentrainer_trains_the_most_important_weights_within_its_flops(micro, rho, tmp_path):
    importance, seen = {}, []
    net = make_net()
    everything = sum(net.get_submodule(name).weight.numel() for name in TARGETS)
    # A step of full fine-tuning takes `everything` forward and twice that backward.
    limit = rho * 3 * everything - everything

    def choose(plain, step, batches, found):
        if step % 4 == 1:
            importance.update(plain.squares(batches))
        elif step % 4 == 2:
            plain.choose(best_set(importance, limit))
            seen.append(plain.chosen)

    config = greentrainer(rho, stage_steps=4)
    follow(config, choose, always=False, steps=11, micro=micro, resume_after=6, folder=tmp_path)
    assert len({frozenset(each) for each in seen}) > 1 or rho < 0.5, "the selection changes"


def test_greentrainer_selects_anew_each_fifth_of_the_training():
    config = greentrainer(total_steps=50)
    assert config.density == pytest.approx(0.25)
    assert config.recipe().schedule.resolve(50).stage_steps == 10


@pytest.mark.parametrize("rho", [0.0, 1 / 3, 1.01, float("nan")])
def test_greentrainer_refuses_fewer_flops_than_the_forward_pass_takes(rho):
    with pytest.raises(ConfigError, match=r"`rho` must be above 1/3.*got"):
        greentrainer(rho)


def test_the_backward_pass_of_greentrainer_ends_at_the_lowest_selected_weight():
    model, optimizer = make_model(greentrainer(0.4, stage_steps=4))
    tokens, labels = (torch.zeros(shape, dtype=torch.long, device=DEVICE) for shape in ((2, 3), (2,)))
    for _ in range(2):
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    lowest = min(TARGETS.index(name) for name in selected(model))
    assert lowest > len(TARGETS) // 2
    inside, reached = model.base_model.model, {}
    for number, layer in enumerate(inside.layers):
        layer.register_forward_hook(lambda *call, number=number: reached.update({number: call[2].requires_grad}))
    model(tokens)
    first = int(TARGETS[lowest].split(".")[1])
    assert reached == {number: number >= first for number in range(LAYERS)}


def test_all_ways_to_spend_are_tried_by_the_reference():
    """The reference takes the best of each size; so few weights can be tried in all ways."""
    net = make_net()
    generator = torch.Generator().manual_seed(0)
    importance = {name: float(torch.rand((), generator=generator)) for name in TARGETS}
    size = {name: net.get_submodule(name).weight.numel() for name in TARGETS}
    last, limit = TARGETS[-6:], 320  # too little for the one before

    def cost(names):
        above = last[last.index(min(names, key=last.index)) + 1 :]
        return sum(size[name] for name in names) + sum(size[name] for name in above)

    sets = [set(each) for count in range(1, 7) for each in combinations(last, count) if cost(each) <= limit]
    assert best_set(importance, limit) == max(sets, key=lambda names: sum(importance[name] for name in names))
