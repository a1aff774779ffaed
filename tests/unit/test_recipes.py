"""A new choice for an axis is one small object: each of these takes at most 15 lines, and trains."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dps import DPSConfig, recipes
from peft_dps.errors import ConfigError
from peft_dps.masking.frozen_policy import FROZEN, FrozenWeight
from peft_dps.masking.noise import NOISES
from peft_dps.selection.budget import BUDGETS
from peft_dps.selection.evidence import EVIDENCE, SummedGradients
from peft_dps.selection.granularity import GRANULARITIES, Granularity
from peft_dps.selection.phase import Phase, Position, Stage
from peft_dps.selection.schedule import SCHEDULES, Schedule
from peft_dps.selection.scope import SCOPES
from peft_dps.selection.scores import SCORES, register_score
from peft_dps.tensors.layout import Units
from tests.unit.conftest import Net, controller_of, train, trainable


def add_score():
    @register_score("least_moved", evidence="none")
    def least_moved(context):
        return 1.0 / (1.0 + (context.weight - context.base_weight).abs())


def add_granularity():
    @GRANULARITIES.register("pair")
    class PairOfRows(Granularity):
        def units(self, layout):
            return Units(layout.shape, 2, (1,) * (len(layout.shape) - 1))


def add_schedule():
    @SCHEDULES.register("each")
    @dataclasses.dataclass(frozen=True)
    class Every(Schedule):
        settings: object

        def at(self, step):
            number, into = divmod(step - 1, self.settings.stage_steps)
            phase = Phase(Stage.SUBNETWORK if number else Stage.ACCUMULATE, gathers=True, masked=number > 0)
            return Position(number, phase, into + 1, self.settings.stage_steps)

        def state(self):
            return {}


def add_frozen_policy():
    @FROZEN.register("halved")
    class Halved(FrozenWeight):
        def mask_gradient_(self, gradient):
            gradient.mul_(torch.where(self.mask.keep.bool(), 1.0, 0.5))


def add_evidence():
    @EVIDENCE.register("largest_gradient")
    class LargestGradient(SummedGradients):
        def add_(self, totals, gradients, scale):
            for total, gradient in zip(totals, gradients, strict=True):
                torch.maximum(total, gradient.abs() / scale, out=total)


ADDED = {
    "score": (add_score, "least_moved", SCORES),
    "granularity": (add_granularity, "pair", GRANULARITIES),
    "schedule": (add_schedule, "each", SCHEDULES),
    "frozen": (add_frozen_policy, "halved", FROZEN),
    "evidence": (add_evidence, "largest_gradient", EVIDENCE),
}


@pytest.fixture
def added():
    for add, _, _ in ADDED.values():
        add()
    yield
    for _, name, registry in ADDED.values():
        registry.unregister(name)


SIZES = (12, 16, 4)


def make(**fields):
    torch.manual_seed(0)
    config = DPSConfig(**{"target_modules": ["layers.0", "layers.1"], "stage_steps": 2, "density": 0.5, **fields})
    return get_peft_model(Net(SIZES), config)


def run(model, batches, steps):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    seen = []
    for batch in batches(steps):
        train(model, optimizer, [batch])
        seen.append([None if w.frozen is None else w.frozen.mask.keep.bool() for w in controller_of(model).weights])
    return seen


@pytest.mark.parametrize("axis", ADDED)
def test_it_takes_at_most_fifteen_lines(axis):
    lines = inspect.getsource(ADDED[axis][0]).splitlines()[1:]
    assert len([line for line in lines if line.strip()]) <= 15


@pytest.mark.parametrize("axis", ADDED)
def test_it_trains_resumes_and_is_saved(added, batches, axis, tmp_path):
    model = make(**{axis: ADDED[axis][1]})
    run(model, batches, 3)
    assert model.dps_status().selected_fraction == pytest.approx(0.5, abs=0.1)
    model.load_dps_state_dict(model.dps_state_dict())
    model.save_pretrained(tmp_path)
    assert getattr(DPSConfig.from_pretrained(str(tmp_path)), axis) == ADDED[axis][1]


def test_all_of_them_together(added, batches):
    model = make(**{axis: name for axis, (_, name, _) in ADDED.items()})
    seen = run(model, batches, 7)
    assert all(mask is not None for mask in seen[-1])


def test_a_new_score_selects(added, batches):
    model = make(score="least_moved")
    first = run(model, batches, 3)[-1][0]
    weight = controller_of(model).weights[0]
    moved = (weight.weight - weight.base_weight).abs().detach()
    assert moved[~first].min() > 0  # those that had moved most are frozen, and keep what they learned


def test_a_new_granularity_selects_its_units(added, batches):
    mask = run(make(granularity="pair"), batches, 3)[-1][0]
    assert all(pair.unique().numel() == 1 for pair in mask.split(2))
    assert int(mask.sum()) == mask.numel() // 2


def test_a_new_schedule_selects_anew_while_a_mask_holds(added, batches):
    seen = run(make(schedule="each"), batches, 7)
    assert [masks[0] is not None for masks in seen] == [False, False, True, True, True, True, True]
    assert torch.equal(seen[2][0], seen[3][0])
    assert not torch.equal(seen[2][0], seen[4][0])


def test_a_new_frozen_policy_is_applied(added, batches):
    model = make(frozen="halved", train_bias=False)
    run(model, batches, 2)
    model.zero_grad()
    weight = controller_of(model).weights[0]
    (x, y), _ = batches(2)
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = weight.parameter.grad.clone()
    torch.optim.SGD(trainable(model), lr=0.0).step()
    keep = weight.frozen.mask.keep.bool()
    assert torch.equal(weight.parameter.grad, torch.where(keep, gradient, gradient / 2))


def test_new_evidence_is_gathered(added, batches):
    model = make(evidence="largest_gradient", train_bias=False)
    optimizer, expected = torch.optim.SGD(trainable(model), lr=1e-2), None
    for x, y in batches(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = controller_of(model).weights[0].parameter.grad.abs()
        expected = gradient.clone() if expected is None else torch.maximum(expected, gradient)
        optimizer.step()
    assert torch.equal(controller_of(model).weights[0].gathered.total, expected)


def test_dense_and_mix_are_recipes_of_the_same_axes():
    dense, mix = recipes.dps_dense(density=0.3).recipe(), recipes.dps_mix(density=0.3).recipe()
    for axis in ("schedule", "evidence", "granularity", "scope", "budget", "storage"):
        assert type(getattr(dense, axis)) is type(getattr(mix, axis))
    assert (dense.score, dense.frozen) == (mix.score, mix.frozen)
    assert (type(dense.noise), type(mix.noise)) == (NOISES.find("none"), NOISES.find("columns"))
    assert DPSConfig(variant="mix").recipe().noise.substitutes
    assert recipes.random_mask().recipe().score is SCORES.find("random")


@pytest.mark.parametrize(
    "registry",
    [SCORES, GRANULARITIES, SCHEDULES, FROZEN, EVIDENCE, SCOPES, NOISES, BUDGETS],
    ids=lambda each: each.field,
)
def test_names_are_checked_when_they_are_given_and_when_they_are_looked_up(registry):
    for bad in ("", 3, None):
        with pytest.raises(ConfigError, match=rf"A name for `{registry.field}` must be a non-empty string, got"):
            registry.register(bad)
        with pytest.raises(ConfigError, match=rf"`{registry.field}` must be one of '.*, got"):
            registry.find(bad)
    with pytest.raises(ConfigError, match="must stand for a class or function, got 3"):
        registry.register("three")(3)
    taken = next(iter(registry))
    with pytest.raises(ConfigError, match=rf"`{registry.field}='{taken}'` is taken by .*; use another name"):
        registry.register(taken)(lambda: None)


def test_an_adapter_loads_without_the_names_that_trained_it(added, batches, tmp_path):
    model = make(**{axis: name for axis, (_, name, _) in ADDED.items()})
    run(model, batches, 3)
    model.save_pretrained(tmp_path)
    x = batches(1)[0][0]
    expected = model(x)
    for _, name, registry in ADDED.values():
        registry.unregister(name)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(SIZES), tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    with pytest.raises(ConfigError, match="must be one of"):
        PeftModel.from_pretrained(Net(SIZES), tmp_path, is_trainable=True)


def test_scoring_before_training_selects_what_the_batches_say(batches):
    model = make(schedule="once", score_steps=0, train_bias=False)
    expected = [torch.zeros_like(weight.weight) for weight in controller_of(model).weights]
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    for batch in batches(3):
        grads = torch.autograd.grad(loss(model, batch), [weight.parameter for weight in controller_of(model).weights])
        for total, grad in zip(expected, grads, strict=True):
            total += grad * grad
    before = [parameter.clone() for parameter in model.parameters()]
    model.dps_score(batches(3), loss)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    masks = run(model, batches, 1)[0]
    for mask, total in zip(masks, expected, strict=True):
        wanted = torch.zeros_like(mask)
        wanted.view(-1)[total.view(-1).argsort(descending=True, stable=True)[: mask.numel() // 2]] = True
        assert torch.equal(mask, wanted)
    assert model.dps_status().stage is Stage.SUBNETWORK
    with pytest.raises(ConfigError, match=r"before the first step; 1 steps have been made"):
        model.dps_score(batches(1), loss)


def test_scoring_before_training_is_for_schedules_that_leave_it_to_that(batches):
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    with pytest.raises(ConfigError, match=r"`schedule='once'` and `score_steps=0`"):
        make(schedule="once").dps_score(batches(1), loss)


def test_once_keeps_its_mask(batches):
    seen = run(make(schedule="once", score_steps=3), batches, 9)
    assert [masks[0] is not None for masks in seen] == [False] * 3 + [True] * 6
    assert all(torch.equal(masks[0], seen[3][0]) for masks in seen[3:])
