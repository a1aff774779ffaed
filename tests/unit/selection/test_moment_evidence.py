from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop

from peft_dps import DPSConfig, Stage
from peft_dps.errors import EngineError, ScoreError
from peft_dps.masking.noise import ColumnNoise
from tests.device import DEVICE, ON_CPU
from tests.reference import ReferenceDense, ReferenceMix
from tests.resuming import held_by
from tests.unit.conftest import controller_of, layers_of, train, trainable

pytestmark = pytest.mark.device

# Decays far from 1, so that scores that were corrected wrongly would choose other entries.
OPTIMIZERS = {
    "adamw": (lambda parameters: AdamW(parameters, lr=1e-2, betas=(0.9, 0.7)), 0.7),
    "adamw_foreach": (lambda parameters: AdamW(parameters, lr=1e-2, betas=(0.9, 0.7), foreach=True), 0.7),
    "adamw_fused": (lambda parameters: AdamW(parameters, lr=1e-2, betas=(0.9, 0.7), fused=True), 0.7),
    "amsgrad": (lambda parameters: Adam(parameters, lr=1e-2, betas=(0.9, 0.7), amsgrad=True), 0.7),
    "nadam": (lambda parameters: NAdam(parameters, lr=1e-2, betas=(0.9, 0.7)), 0.7),
    "radam": (lambda parameters: RAdam(parameters, lr=1e-2, betas=(0.9, 0.7)), 0.7),
    "rmsprop": (lambda parameters: RMSprop(parameters, lr=1e-3, alpha=0.7), 0.7),
    "adagrad": (lambda parameters: Adagrad(parameters, lr=1e-2), 1.0),
}
FIELDS = {"density": 0.4, "stage_steps": 3}
SIZES = (12, 7, 9, 3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_lean_training_is_bitwise_the_reference_with_decaying_scores(
    make_model, make_net, batches, optimizer, frozen, scope
):
    fields = {**FIELDS, "scope": scope, "frozen": frozen}
    make_optimizer, decay = OPTIMIZERS[optimizer]
    model, plain = make_model(sizes=SIZES, lean=True, **fields), make_net(sizes=SIZES)
    reference = ReferenceDense([layer.weight for layer in plain.layers], forget=decay, **fields)
    ours, theirs = make_optimizer(trainable(model)), make_optimizer(plain.parameters())
    for x, y in batches(20):
        train(model, ours, [(x, y)])
        theirs.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        for layer, expected in zip(layers_of(model), plain.layers, strict=True):
            assert torch.equal(layer.dps_weight["default"], expected.weight)


@pytest.mark.parametrize("decay", [False, True])
def test_lean_mix_follows_the_reference_with_decaying_scores(make_model, make_net, batches, decay):
    model = make_model(sizes=SIZES, lean=True, variant="mix", participation_decay=decay, seed=5, **FIELDS)
    plain = make_net(sizes=SIZES)
    noise = ColumnNoise(FIELDS["density"], seed=5)
    reference = ReferenceMix(
        [layer.weight for layer in plain.layers],
        draw=lambda step: [row.float() for row in noise.draw(step, SIZES[:-1], DEVICE)],
        decay=decay,
        forget=0.7,
        **FIELDS,
    )
    make_optimizer = OPTIMIZERS["adamw"][0]
    ours, theirs = make_optimizer(trainable(model)), make_optimizer(plain.parameters())
    for x, y in batches(14):
        train(model, ours, [(x, y)])
        theirs.zero_grad()
        hidden = x
        for index, (weight, layer) in enumerate(zip(reference.effective(), plain.layers, strict=True)):
            hidden = nn.functional.linear(torch.tanh(hidden) if index else hidden, weight, layer.bias)
        nn.functional.cross_entropy(hidden, y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        for tracked, layer in zip(controller_of(model).weights, plain.layers, strict=True):
            torch.testing.assert_close(tracked.weight.detach(), layer.weight.detach(), rtol=0, atol=1e-6)


def test_lean_mode_keeps_neither_scores_nor_frozen_bits_nor_pretrained_weights(make_model, batches):
    model = make_model(lean=True)
    optimizer = AdamW(trainable(model), lr=1e-2)
    weights, reached = controller_of(model).weights, set()
    for batch in batches(9):
        train(model, optimizer, [batch])
        assert not any({"total", "held", "snapshot"} & set(held_by(weight)) for weight in weights)
        reached.add(model.dps_status().stage)
        assert not model.dps_status().frozen_moved
    assert reached == {Stage.ACCUMULATE, Stage.SUBNETWORK}
    assert all(layer.is_offloaded for layer in layers_of(model))


@pytest.mark.skipif(not ON_CPU, reason="an accelerator keeps them: they would have to be copied there for each use")
def test_the_originals_of_modules_trained_in_full_are_kept_in_a_file(make_net, batches):
    net = make_net()
    model = get_peft_model(net, DPSConfig(target_modules=["layers.0"], train_remaining=True, lean=True, stage_steps=2))
    original = model.base_model.model.layers[1].original_module
    in_memory, values = original.weight.data_ptr(), original.weight.clone()
    x, _ = batches(1)[0]
    with model.disable_adapter():
        before = model(x)
    train(model, AdamW(trainable(model), lr=1e-2), batches(5))
    assert original.weight.data_ptr() != in_memory
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert torch.equal(original.weight, values)


def test_frozen_entries_that_are_changed_from_outside_are_told_and_held_as_they_are(make_model, batches, caplog):
    model = make_model(lean=True)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(3))
    weight = controller_of(model).weights[0]
    frozen = held_by(weight)["keep"] == 0
    with torch.no_grad():
        weight.parameter[frozen] += 1.0
    before = weight.weight[frozen].clone()
    train(model, optimizer, batches(1))
    assert torch.equal(weight.weight[frozen], before)
    assert model.dps_status().frozen_moved
    assert caplog.text.count("changed outside of the optimizer") == 1


def test_a_weight_without_gradient_in_a_stage_scores_zero(make_model, batches):
    model = make_model(lean=True)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for x, _ in batches(3):
        optimizer.zero_grad()
        model(x)[:, :1].sum().backward()
        layers_of(model)[0].dps_weight["default"].grad = None
        optimizer.step()
    first = controller_of(model).weights[0]
    assert torch.equal(
        held_by(first)["keep"].bool().flatten(), torch.arange(first.entries, device=DEVICE) < first.selected
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda parameters: SGD(parameters, lr=0.1), "SGD keeps none of 'layers.0'"),
        (lambda parameters: Adam(parameters, lr=0.1, weight_decay=0.1), "Adam with weight_decay=0.1"),
        (lambda parameters: RMSprop(parameters, lr=0.1, weight_decay=0.1), "RMSprop with weight_decay=0.1"),
    ],
)
def test_optimizers_without_a_second_moment_of_the_gradient_are_refused(make_model, batches, make, message):
    model = make_model(lean=True)
    with pytest.raises(EngineError, match=message):
        train(model, make(trainable(model)), batches(1))


def test_an_optimizer_that_turns_out_to_keep_something_else_is_refused(make_model, batches):
    class Lion(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.99)})

        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))

    model = make_model(lean=True)
    with pytest.raises(EngineError, match="Lion keeps none"):
        train(model, Lion(trainable(model)), batches(2))


def test_an_optimizer_whose_state_is_kept_by_another_is_refused(make_model, batches):
    class Wrapping(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.optim = AdamW(parameters)
            super().__init__(self.optim.param_groups, self.optim.defaults)

        def step(self, closure=None):
            self.optim.step()

    model = make_model(lean=True)
    with pytest.raises(EngineError, match=r"Wrapping has none of 'layers.0' after its steps"):
        train(model, Wrapping(trainable(model)), batches(3))


def test_an_optimizer_that_is_gone_is_told(make_model, batches):
    model = make_model(lean=True)
    train(model, AdamW(trainable(model), lr=1e-2), batches(2))
    with pytest.raises(EngineError, match="does not exist any more"):
        model.dps_state_dict()


@pytest.mark.parametrize("steps", [1, 2])
def test_another_optimizer_in_the_middle_of_a_stage_is_refused(make_model, batches, steps):
    model = make_model(lean=True, stage_steps=3)
    optimizers = [AdamW(trainable(model), lr=1e-2) for _ in range(2)]
    train(model, optimizers[0], batches(steps))
    with pytest.raises(EngineError, match="another optimizer has come in the middle of an ACCUMULATE stage"):
        train(model, optimizers[1], batches(1))
    # What it has begun to count goes on with the one that it knows.
    train(model, optimizers[0], batches(2 - steps))
    train(model, optimizers[1], batches(1))  # SUBNETWORK, with scores from the other one
    assert model.dps_status().engaged
    train(model, optimizers[1], batches(3))


def test_an_optimizer_with_the_state_of_the_other_takes_the_stage_over(make_model, batches):
    taken, kept = (make_model(lean=True, stage_steps=3) for _ in range(2))
    data = batches(6)
    first, second, alone = (AdamW(trainable(model), lr=1e-2) for model in (taken, taken, kept))
    train(taken, first, data[:2])
    second.load_state_dict(first.state_dict())
    taken.load_dps_state_dict(taken.dps_state_dict())
    train(taken, second, data[2:])
    train(kept, alone, data)
    for one, two in zip(controller_of(taken).weights, controller_of(kept).weights, strict=True):
        assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_stages_of_one_step(make_model, batches, variant):
    model = make_model(lean=True, stage_steps=1, variant=variant)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for batch in batches(4):
        train(model, optimizer, [batch])
        model.dps_state_dict()
    assert model.dps_status().engaged


@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_copies_with_their_optimizer_go_on_alike(make_model, batches, variant, steps):
    model = make_model(lean=True, stage_steps=2, variant=variant)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(steps))
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    for each, steps_with in ((model, optimizer), (copied, its_optimizer)):
        train(each, steps_with, batches(8)[3:])
    for one, two in zip(controller_of(model).weights, controller_of(copied).weights, strict=True):
        assert torch.equal(one.weight, two.weight)
        assert one.weight is not two.weight


def test_a_copy_without_an_optimizer_is_none_to_train(make_model, batches):
    model = make_model(lean=True, stage_steps=2)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(2))
    del optimizer
    gc.collect()
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(batches(1)[0][0]), model.eval()(batches(1)[0][0]))


def test_any_optimizer_may_come_where_nothing_is_selected(make_model, batches):
    model = make_model(lean=True, density=1.0)
    for batch in batches(4)[1:]:
        train(model, AdamW(trainable(model), lr=1e-2), [batch] * 2)
    assert model.dps_status().steps == 6


def test_a_nan_in_the_second_moment_is_told_at_the_selection(make_model, batches):
    model = make_model(lean=True)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(1))
    weight = controller_of(model).weights[0].parameter
    optimizer.state[weight]["exp_avg_sq"][0, 0] = torch.nan
    with pytest.raises(ScoreError, match=r"The weight of 'layers.0': .* NaN.* Look for NaN or inf in the gradients"):
        train(model, optimizer, batches(2))
