"""LT-SFT beside a plain loop: train all, keep what moved most, rewind, and train that with a new optimizer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from peft_dps import DPSConfig, Stage, dps_adapter, recipes
from peft_dps.errors import ConfigError, EngineError, StateError
from tests.device import DEVICE
from tests.step_by_step import (
    OPTIMIZERS,
    TARGETS,
    Ours,
    compare,
    loss_of,
    make_batches,
    make_net,
    micro_batches,
    same,
)
from tests.unit.conftest import controller_of, layers_of, trainable

pytestmark = pytest.mark.device

DENSITY, FIRST, STEPS = 0.2, 3, 8


def config(**fields):
    return recipes.lt_sft(**{"target_modules": TARGETS, "density": DENSITY, "stage_steps": FIRST, **fields})


class Reference:
    """The two trainings of the paper, one after the other."""

    def __init__(self, optimizer: str, scope: str = "model") -> None:
        self.net, self.name, self.scope = make_net(), optimizer, scope
        self.pretrained = copy.deepcopy(self.net)
        self.optimizer = OPTIMIZERS[optimizer](list(self.net.parameters()))
        self.masks = None
        self.done = 0

    def step(self, batch, micro: int = 1) -> None:
        if self.done == FIRST:
            self.masks = self.select()
            self.net.load_state_dict(self.pretrained.state_dict())
            self.optimizer = OPTIMIZERS[self.name](list(self.net.parameters()))
        for part in micro_batches(batch, micro):
            (loss_of(self.net, part) / micro).backward()
        before = [layer.weight.detach().clone() for layer in self.net.layers]
        self.optimizer.step()
        if self.masks is not None:
            with torch.no_grad():
                for layer, mask, values in zip(self.net.layers, self.masks, before, strict=True):
                    layer.weight.copy_(torch.where(mask, layer.weight, values))
        self.optimizer.zero_grad()
        self.done += 1

    def select(self):
        pairs = zip(self.net.layers, self.pretrained.layers, strict=True)
        moved = [(a.weight - b.weight).abs().flatten().tolist() for a, b in pairs]
        everything = [(-value, w, i) for w, values in enumerate(moved) for i, value in enumerate(values)]
        groups = [everything] if self.scope == "model" else [[e for e in everything if e[1] == w] for w in range(3)]
        chosen = {entry[1:] for group in groups for entry in sorted(group)[: math.ceil(len(group) * DENSITY)]}
        return [
            torch.tensor([(w, i) in chosen for i in range(layer.weight.numel())]).view(layer.weight.shape).to(DEVICE)
            for w, layer in enumerate(self.net.layers)
        ]

    @property
    def values(self):
        return [layer.weight for layer in self.net.layers], [layer.bias for layer in self.net.layers]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_follows_the_reference(optimizer, scope, micro):
    ours, reference = Ours(lambda: config(scope=scope), optimizer), Reference(optimizer, scope)
    for batch in make_batches(STEPS):
        ours.step(batch, micro)
        reference.step(batch, micro)
        compare(ours, *reference.values)
        if reference.masks is not None:
            assert all(torch.equal(a, b) for a, b in zip(ours.masks, reference.masks, strict=True))
    assert not ours.model.dps_status().frozen_moved
    assert ours.model.dps_status().selected == sum(int(mask.sum()) for mask in reference.masks)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_it_resumes_to_the_bit_after_every_step(stop):
    ours, data = Ours(config), make_batches(STEPS)
    for batch in data[:stop]:
        ours.step(batch)
    resumed = ours.resumed()
    for batch in data[stop:]:
        ours.step(batch)
        resumed.step(batch)
        assert same(ours, resumed)
        assert ours.model.dps_status() == resumed.model.dps_status()


def test_a_fraction_is_one_of_all_steps():
    ours = Ours(lambda: config(stage_steps=0.25, total_steps=40))
    for batch in make_batches(10):
        ours.step(batch)
    assert ours.model.dps_status().stage is Stage.ACCUMULATE
    ours.step(make_batches(1)[0])
    assert ours.model.dps_status().stage is Stage.SUBNETWORK
    assert ours.model.dps_status().stage_steps is None
    with pytest.raises(ConfigError, match=r"`stage_steps` is 8 of only 8 training steps.*smaller `stage_steps`"):
        config(stage_steps=8, total_steps=8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(reentrant):
    ours, other = Ours(config), Ours(config)
    for x, y in make_batches(STEPS):
        ours.step((x, y))
        output = checkpoint(other.model, x.clone().requires_grad_(), use_reentrant=reentrant)
        nn.functional.cross_entropy(output, y).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
        assert same(ours, other)


def test_a_forward_begins_the_second_phase_from_the_pretrained_weights():
    ours, data = Ours(config), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
    moved = ours.model(data[0][0]).detach()  # by the rewound weights
    assert torch.equal(moved, make_net()(data[0][0]))
    for layer in layers_of(ours.model):
        assert torch.equal(layer.dps_weight["default"], layer.base_layer.weight)
        assert torch.equal(layer.dps_bias["default"], layer.base_layer.bias)
    ours.backward(data[0])
    ours.optimizer.step()
    assert {int(state["step"]) for state in ours.optimizer.state.values()} == {1}


def test_other_parameters_and_frozen_ones_are_left_alone():
    def some():
        return config(target_modules=TARGETS[1:], modules_to_save=["layers.0"])

    ours, data = Ours(some), make_batches(STEPS)
    still = layers_of(ours.model)[2]
    still.requires_grad_(False)
    with torch.no_grad():
        still.dps_weight["default"].add_(1.0)
    before = still.dps_weight["default"].clone()
    for batch in data[: FIRST + 1]:
        ours.step(batch)
    saved = layers_of(ours.model)[0].modules_to_save["default"]
    assert int(ours.optimizer.state[saved.weight]["step"]) == FIRST + 1
    assert torch.equal(still.dps_weight["default"], before)


def test_biases_of_an_optimizer_of_their_own_begin_anew_too():
    ours, reference = Ours(config), Reference("adamw")
    weights = [layer.dps_weight["default"] for layer in layers_of(ours.model)]
    biases = [layer.dps_bias["default"] for layer in layers_of(ours.model)]
    optimizers = [OPTIMIZERS["adamw"](parameters) for parameters in (biases, weights)]
    for batch in make_batches(STEPS):
        ours.backward(batch)
        for each in optimizers:
            each.step()
            each.zero_grad()
        reference.step(batch)
        compare(ours, *reference.values)


def test_optimizers_that_step_in_the_backward_pass():
    ours, reference = Ours(config, "sgd"), Reference("sgd")
    for parameter in trainable(ours.model):
        own = OPTIMIZERS["sgd"]([parameter])

        def step_now(_, own=own):
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(step_now)
    for batch in make_batches(STEPS):
        ours.backward(batch)
        reference.step(batch)
        compare(ours, *reference.values)


def test_a_closure_whose_forward_rewinds():
    ours, reference = Ours(config), Reference("adamw")
    for batch in make_batches(STEPS):

        def closure(batch=batch):
            ours.optimizer.zero_grad()
            loss = loss_of(ours.model, batch)
            loss.backward()
            return loss

        ours.optimizer.step(closure)
        reference.step(batch)
        compare(ours, *reference.values)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled_training_equals_eager():
    torch._dynamo.reset()
    ours, other = Ours(config), Ours(config)
    fast = torch.compile(other.model, backend="aot_eager")
    for batch in make_batches(STEPS):
        ours.step(batch)
        loss_of(fast, batch).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
        for a, b in zip(trainable(ours.model), trainable(other.model), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_goes_on_like_the_original(copied):
    ours, data = Ours(config, "sgd"), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
    ours.optimizer = SGD(trainable(ours.model), lr=0.1)
    other = copy.copy(ours)
    other.model = copied(ours.model)
    other.optimizer = SGD(trainable(other.model), lr=0.1)
    for batch in data[FIRST:]:
        ours.step(batch)
        other.step(batch)
        assert same(ours, other)


@pytest.mark.parametrize("only", [None, "layers.1"])
def test_a_second_phase_whose_forward_is_not_seen_is_an_error(only):
    ours, data = Ours(config), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
    (ours.model if only is None else layers_of(ours.model)[1]).eval()
    ours.backward(data[FIRST])
    what = "no forward in training mode" if only is None else "the layer 'layers.1' is in eval mode"
    with pytest.raises(EngineError, match=rf"step {FIRST + 1} begins a phase with the pretrained.*{what}.*train\(\)"):
        ours.optimizer.step()
    ours.model.train().zero_grad()
    ours.step(data[FIRST])
    assert ours.model.dps_status().stage is Stage.SUBNETWORK


def test_saving_between_the_forward_that_rewinds_and_its_step_is_refused():
    ours, data = Ours(config), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
    ours.backward(data[FIRST])
    with pytest.raises(StateError, match=r"a forward has rewound the weights.*after `optimizer.step\(\)`"):
        ours.model.dps_state_dict()
    ours.optimizer.step()
    ours.model.dps_state_dict()


def test_another_optimizer_of_the_step_before_is_refused_after_the_rewinding():
    ours, data = Ours(config), make_batches(STEPS)
    one, other = ([layer.dps_weight["default"]] for layer in layers_of(ours.model)[:2])
    optimizers = [SGD(parameters, lr=0.1) for parameters in (one, other)]
    for batch in data[: FIRST - 1]:
        ours.backward(batch)
        for each in optimizers:
            each.step()
            each.zero_grad()
    ours.backward(data[0])
    optimizers[0].step()
    ours.backward(data[1])
    with pytest.raises(EngineError, match=rf"another optimizer of step {FIRST}, .*rewound weights, of the next step"):
        optimizers[1].step()


def test_a_selection_that_fails_is_made_again_before_anything_is_rewound(monkeypatch):
    ours, reference, data = Ours(config), Reference("adamw"), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
        reference.step(batch)
    weight = controller_of(ours.model).weights[1]
    original = weight.rewind

    def fail():
        raise MemoryError

    monkeypatch.setattr(weight, "rewind", fail)
    with pytest.raises(MemoryError):
        ours.backward(data[FIRST])
    monkeypatch.setattr(weight, "rewind", original)
    for batch in data[FIRST:]:
        ours.step(batch)
        reference.step(batch)
        compare(ours, *reference.values)


def test_a_new_training_begins_with_the_first_phase():
    ours, data = Ours(config), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
    ours.backward(data[FIRST])
    dps_adapter(ours.model).set_total_steps(STEPS)
    ours.optimizer.step()
    assert ours.model.dps_status().stage is Stage.ACCUMULATE
    ours.model.dps_state_dict()


def test_it_goes_with_the_noise_of_mix():
    ours, data = Ours(lambda: config(noise="columns")), make_batches(STEPS)
    for batch in data[:FIRST]:
        ours.step(batch)
    output = ours.model(data[0][0])
    assert torch.equal(output, make_net()(data[0][0]))  # T + M * (W - T) / density, with W = T = W0
    for batch in data[FIRST:]:
        ours.step(batch)
    for weight, mask in zip(controller_of(ours.model).weights, ours.masks, strict=True):
        assert torch.equal(weight.frozen.snapshot, weight.base_weight)
        assert torch.equal(weight.weight[~mask], weight.base_weight[~mask])


def test_compact_storage_is_refused_by_name():
    for schedule in ("two-phase", "full"):
        with pytest.raises(ConfigError, match=rf"`storage='compact'` does not go with `schedule='{schedule}'`, "):
            DPSConfig(storage="compact", granularity="column", schedule=schedule)
