from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
import weakref

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.optim import SGD, Adafactor, AdamW

from peft_dps import DPSConfig, Stage, dps_adapter, register_score
from peft_dps.errors import ConfigError, EngineError, ScheduleError, ScoreError
from peft_dps.masking import frozen_policy
from peft_dps.masking.frozen_policy import FrozenWeight
from peft_dps.masking.mask import Mask
from peft_dps.selection.schedule import Cycle
from peft_dps.selection.scores import SCORES
from peft_dps.tuner.adapter import find_trained
from tests.device import DEVICE
from tests.reference import ReferenceDense
from tests.unit.conftest import controller_of, keep_of, layers_of, train, trainable, weights_of

pytestmark = pytest.mark.device

OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw_foreach": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_loop": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw_fused": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-2, weight_decay=0.1),
}


class Guarded(SGD):
    """Updates nothing that has a gradient of NaN or inf, as careful training loops do."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if not torch.isfinite(parameter.grad).all():
                parameter.grad = None
        super().step()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(torch.int32)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
def test_training_is_bitwise_the_reference(make_model, make_net, batches, optimizer, frozen, scope, score_dtype):
    fields = {"density": 0.3, "stage_steps": 3, "scope": scope, "frozen": frozen}
    sizes = (12, 7, 9, 3)
    model, plain = make_model(sizes=sizes, score_dtype=score_dtype, **fields), make_net(sizes=sizes)
    adds_up_in = getattr(torch, score_dtype)
    reference = ReferenceDense([layer.weight for layer in plain.layers], adds_up_in=adds_up_in, **fields)
    ours, theirs = OPTIMIZERS[optimizer](trainable(model)), OPTIMIZERS[optimizer](plain.parameters())
    for x, y in batches(14):
        train(model, ours, [(x, y)])
        theirs.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        for layer, expected in zip(layers_of(model), plain.layers, strict=True):
            assert torch.equal(layer.dps_weight["default"], expected.weight)
            assert torch.equal(layer.dps_bias["default"], expected.bias)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_density_one_is_bitwise_plain_fine_tuning(make_model, make_net, batches, optimizer, frozen):
    model, plain = make_model(density=1.0, frozen=frozen), make_net()
    ours, theirs = OPTIMIZERS[optimizer](trainable(model)), OPTIMIZERS[optimizer](plain.parameters())
    for batch in batches(7):
        train(model, ours, [batch])
        train(plain, theirs, [batch])
    for layer, expected in zip(layers_of(model), plain.layers, strict=True):
        assert torch.equal(bits(layer.dps_weight["default"]), bits(expected.weight))


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.7])
def test_exactly_ceil_of_the_density_is_selected_in_each_weight(make_model, batches, density):
    model = make_model(density=density)
    train(model, AdamW(trainable(model)), batches(3))
    for layer in model.dps_status().layers.values():
        assert layer.selected == -(-layer.entries * density // 1)  # ceil
    assert model.dps_status().frozen_moved is False


def test_scope_model_selects_exactly_over_all_weights(make_model, batches):
    model = make_model(density=0.2, scope="model")
    train(model, AdamW(trainable(model)), batches(3))
    status = model.dps_status()
    assert status.selected == 48  # ceil(240 * 0.2)
    assert len({layer.selected / layer.entries for layer in status.layers.values()}) == 2


def test_state_of_a_stage_is_freed_before_the_next(make_model, batches):
    model = make_model()
    optimizer, data = AdamW(trainable(model)), batches(5)
    weights = controller_of(model).weights
    train(model, optimizer, data[:2])
    assert all(weight.gathered.total is not None and weight.frozen is None for weight in weights)
    train(model, optimizer, data[2:4])
    assert all(weight.gathered.total is None and weight.frozen.held is not None for weight in weights)
    train(model, optimizer, data[4:])
    assert all(weight.gathered.total is not None and weight.frozen is None for weight in weights)


def test_random_score_keeps_no_gradients_and_repeats(make_model, batches):
    chosen = []
    for _ in range(2):
        model = make_model(score="random", seed=3)
        optimizer = AdamW(trainable(model))
        train(model, optimizer, batches(2))
        assert all(weight.gathered.memory() is None for weight in controller_of(model).weights)
        train(model, optimizer, batches(1))
        chosen.append([keep_of(weight).clone() for weight in controller_of(model).weights])
    other = make_model(score="random", seed=4)
    train(other, AdamW(trainable(other)), batches(3))
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))
    assert not torch.equal(chosen[0][0], keep_of(controller_of(other).weights[0]))


def test_random_masks_differ_between_cycles_and_weights(make_model, batches):
    model = make_model(score="random", stage_steps=1, sizes=(12, 12, 12, 3))
    optimizer, seen = AdamW(trainable(model)), []
    for batch in batches(4):
        train(model, optimizer, [batch])
        if controller_of(model).stage is Stage.SUBNETWORK:
            seen += [keep_of(weight).clone() for weight in controller_of(model).weights[:2]]
    assert len(seen) == 4
    assert not any(torch.equal(a, b) for index, a in enumerate(seen) for b in seen[index + 1 :])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_bad_gradients_is_counted_but_not_scored(make_model, batches, caplog, bad):
    model = make_model(stage_steps=3)
    optimizer = Guarded(trainable(model), lr=0.1)
    totals = []
    for step, (x, y) in enumerate(batches(3)):
        nn.functional.cross_entropy(model(x), y).backward()
        if step == 1:
            weights_of(model)[0].grad[0, 0] = bad
        with caplog.at_level(logging.WARNING):
            optimizer.step()
        optimizer.zero_grad()
        totals.append([weight.gathered.total.clone() for weight in controller_of(model).weights])
    assert all(torch.equal(a, b) for a, b in zip(totals[0], totals[1], strict=True))
    assert not torch.equal(totals[1][0], totals[2][0])
    status = model.dps_status()
    assert (status.steps, status.unscored_steps) == (3, 1)
    assert "step 2 are not finite" in caplog.text


def test_a_stage_without_any_finite_gradient_is_an_error_and_keeps_the_weights(make_model, batches):
    model = make_model()
    optimizer = Guarded(trainable(model), lr=0.1)
    for x, y in batches(2):
        nn.functional.cross_entropy(model(x), y).backward()
        weights_of(model)[0].grad.fill_(float("nan"))
        optimizer.step()
    before = [weight.detach().clone() for weight in weights_of(model)]
    with pytest.raises(ScoreError, match="no step of the ACCUMULATE stage that ended with step 2 was scored"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model), strict=True))


def test_bad_gradients_of_frozen_entries_do_no_harm_in_subnetwork(make_model, batches):
    model = make_model(stage_steps=1)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, batches(1))
    x, y = batches(1, seed=2)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    weight, before = weights_of(model)[0], weights_of(model)[0].detach().clone()
    # Which entries will be frozen is known from the scores: the first weight's lower half.
    total = controller_of(model).weights[0].gathered.total.flatten()
    frozen = torch.ones(weight.numel(), dtype=torch.bool, device=DEVICE)
    frozen[total.argsort(descending=True)[: weight.numel() // 2]] = False
    frozen = frozen.view(weight.shape)
    weight.grad[frozen] = float("nan")
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert torch.equal(bits(weight)[frozen], bits(before)[frozen])


def test_fraction_without_total_is_an_error_that_names_three_remedies_before_the_first_step(make_model, batches):
    model = make_model(stage_steps=0.1)
    with pytest.raises(ScheduleError) as error:
        model(batches(1)[0][0])
    for remedy in ("total_steps=", "as an int", "set_dps_total_steps"):
        assert remedy in str(error.value)


def test_total_steps_turn_the_fraction_into_steps(make_model, batches):
    model = make_model(stage_steps=0.25)
    model.set_dps_total_steps(48)
    train(model, AdamW(trainable(model)), batches(13))
    status = model.dps_status()
    assert (status.stage_steps, status.stage, status.step_in_stage) == (12, Stage.SUBNETWORK, 1)


def test_a_loop_that_says_nothing_of_its_length_trains_in_stages_of_ten_steps(make_model, batches, caplog):
    model = make_model(stage_steps=None)
    train(model, AdamW(trainable(model)), batches(11))
    status = model.dps_status()
    assert (status.stage_steps, status.stage, status.step_in_stage) == (10, Stage.SUBNETWORK, 1)
    assert caplog.text.count("the number of training steps, of which it would be 0.05, is unknown") == 1


def test_a_training_too_short_for_its_fraction_is_refused_before_the_first_step(make_model, batches):
    model = make_model(stage_steps=0.25)
    model.set_dps_total_steps(19)
    with pytest.raises(ConfigError, match=r"`stage_steps=0.25` is a fraction of only 19 training steps.* needs 20"):
        model(batches(1)[0][0])


@pytest.mark.parametrize(
    ("fields", "steps", "said"),
    [
        ({"stage_steps": None}, 6, "saved after 6 steps: no subnetwork has been selected.*smaller `stage_steps`"),
        ({"schedule": "once"}, 12, "saved after 12 steps: `score_steps=8` of 12 training steps leaves 4"),
        ({"schedule": "once"}, 16, ""),
        ({"schedule": "full", "noise": "mixout"}, 1, ""),
        ({"stage_steps": 3, "total_steps": 9}, 2, ""),
    ],
)
def test_saving_tells_of_a_training_too_short_that_has_said_nothing_of_its_length(
    make_model, batches, caplog, tmp_path, fields, steps, said
):
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    train(model, AdamW(trainable(model)), batches(steps))
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert re.search(said, caplog.text) if said else not caplog.text
    caplog.clear()
    model.merge_and_unload()
    assert re.search(said.replace("saved", "merged"), caplog.text) if said else not caplog.text


@pytest.mark.parametrize("total", [1, 20.5, True])
def test_total_steps_that_are_no_number_of_steps_are_refused(make_model, total):
    with pytest.raises(ConfigError, match=rf"total_steps.*got {total}"):
        make_model().set_dps_total_steps(total)


def test_status_of_adapters_injected_without_a_peft_model(make_net, batches):
    net = inject_adapter_in_model(DPSConfig(target_modules=["layers.0", "layers.1"], stage_steps=1), make_net())
    train(net, SGD(trainable(net), lr=0.1), batches(2))
    assert dps_adapter(net).status().stage is Stage.SUBNETWORK
    with pytest.raises(ConfigError, match=r"one of \['default'\], got 'other'"):
        dps_adapter(net, "other").status()
    with pytest.raises(ConfigError, match=r"one of \[\], got None"):
        dps_adapter(make_net()).status()


def test_a_weight_changed_without_its_gradient_is_an_error_at_selection(make_model, batches):
    model = make_model()
    optimizer = SGD([weights_of(model)[0]], lr=0.1)  # the other weight is stepped where the bridge cannot see it
    for x, y in batches(2):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            weights_of(model)[1].sub_(0.1 * weights_of(model)[1].grad)
        model.zero_grad()
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(EngineError, match=r"layers\.1"):
        optimizer.step()


def test_an_unused_layer_is_no_error(make_model, batches):
    model = make_model()
    used = layers_of(model)[0]
    optimizer = AdamW(trainable(model), lr=1e-2)
    for x, _ in batches(4):
        optimizer.zero_grad()
        used(x).square().mean().backward()
        optimizer.step()
    status = model.dps_status()
    assert [layer.observed for layer in status.layers.values()] == [2, 0]
    assert not status.frozen_moved


def test_sparse_gradients_are_refused(make_model):
    model = make_model()
    weights_of(model)[0].grad = torch.zeros_like(weights_of(model)[0]).to_sparse()
    with pytest.raises(EngineError, match="layout"):
        SGD(trainable(model)).step()


def test_copies_train_on_like_the_original_and_apart_from_it(make_model, batches):
    model = make_model(stage_steps=2)
    optimizer = SGD(trainable(model), lr=0.1)
    data = batches(8)
    train(model, optimizer, data[:3])
    twins = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}  # noqa: S301
    train(model, optimizer, data[3:])
    for how, twin in twins.items():
        assert twin.dps_status().steps == 3, how
        train(twin, SGD(trainable(twin), lr=0.1), data[3:])
        assert twin.dps_status() == model.dps_status(), how
        assert all(torch.equal(a, b) for a, b in zip(weights_of(twin), weights_of(model), strict=True)), how


def test_a_dead_model_is_freed_without_the_cycle_collector(make_model, batches):
    model = make_model()
    train(model, AdamW(trainable(model)), batches(3))
    layer = weakref.ref(layers_of(model)[0])
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_steps_that_reach_different_weights_all_count(make_model, batches):
    model = make_model(sizes=(12, 12, 12), stage_steps=2)
    optimizer = SGD(trainable(model), lr=0.1)
    for step, (x, _) in enumerate(batches(8)):
        optimizer.zero_grad()
        layers_of(model)[step % 2](x).square().mean().backward()
        optimizer.step()
    assert model.dps_status().steps == 8


@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_weights_loaded_in_subnetwork_are_kept(make_model, batches, caplog, frozen):
    model = make_model(frozen=frozen)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(3))
    with torch.no_grad():
        for weight in weights_of(model):
            weight.copy_(weight + 1.0)
    loaded = [weight.detach().clone() for weight in weights_of(model)]
    train(model, optimizer, batches(1))
    for tracked, before in zip(controller_of(model).weights, loaded, strict=True):
        frozen_entries = ~keep_of(tracked).bool()
        assert torch.equal(tracked.weight[frozen_entries], before[frozen_entries])
    assert model.dps_status().frozen_moved
    # With "gradient" the optimizer itself moves frozen entries, so nothing tells who did it.
    assert ("changed outside of the optimizer" in caplog.text) is (frozen == "exact")


def test_weights_swapped_out_and_in_again_are_no_alarm(make_model, batches, caplog):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(3))
    for weight in weights_of(model):
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            weight.copy_(saved)
    train(model, optimizer, batches(1))
    assert not model.dps_status().frozen_moved
    assert not caplog.text


def test_status_tells_a_moved_frozen_entry(make_model, batches):
    for frozen in ("exact", "gradient"):
        model = make_model(frozen=frozen, density=0.5)
        train(model, SGD(trainable(model), lr=0.1), batches(3))
        weight = controller_of(model).weights[0]
        assert not model.dps_status().frozen_moved
        with torch.no_grad():
            weight.weight.view(-1)[(keep_of(weight).view(-1) == 0).nonzero()[0]] += 1e-3
        assert model.dps_status().frozen_moved


def test_status_prints(make_model, batches):
    model = make_model()
    assert "no optimizer step seen" in str(model.dps_status())
    assert not model.dps_status().engaged
    train(model, SGD(trainable(model), lr=0.1), batches(3))
    assert "step 3, cycle 1, subnetwork 1/2, selected 50.0% of 240 entries, frozen entries unmoved" in str(
        model.dps_status()
    )
    assert model.dps_status().engaged
    train(model, SGD(trainable(model), lr=0.1), batches(2))
    assert "accumulate 1/2, scoring 240 entries, last selected 50.0%" in str(model.dps_status())


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_selection_that_was_interrupted_is_repeated_whole(make_model, batches, scope):
    attempts = []

    @register_score("interrupted")
    def interrupted(context):
        attempts.append(1)
        if len(attempts) == 2:
            raise MemoryError
        return context.evidence

    try:
        broken = make_model(scope=scope, score="interrupted", stage_steps=2)
        whole = make_model(scope=scope, stage_steps=2)
        ours, theirs = (SGD(trainable(model), lr=0.1) for model in (broken, whole))
        data = batches(3)
        train(broken, ours, data[:2])
        with pytest.raises(MemoryError):
            train(broken, ours, data[2:])
        train(broken, ours, data[2:])
        train(whole, theirs, data)
        for one, two in zip(controller_of(broken).weights, controller_of(whole).weights, strict=True):
            assert torch.equal(keep_of(one), keep_of(two))
            assert torch.equal(one.weight, two.weight)
    finally:
        SCORES.unregister("interrupted")


def test_another_dtype_in_the_middle_of_subnetwork_is_refused(make_model, batches):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(3))
    model.to(torch.bfloat16)
    nn.functional.cross_entropy(model(batches(1)[0][0].bfloat16()).float(), batches(1)[0][1]).backward()
    with pytest.raises(EngineError, match=r"went from torch.float32 to torch.bfloat16"):
        optimizer.step()


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_rewriting_the_same_values_changes_nothing(make_model, batches, caplog, variant):
    touched, left = (make_model(variant=variant, frozen="gradient", stage_steps=3) for _ in range(2))
    optimizers = [AdamW(trainable(model), lr=1e-2) for model in (touched, left)]
    for batch in batches(6):
        for weight in weights_of(touched):
            with torch.no_grad():
                weight.copy_(weight.clone())
        train(touched, optimizers[0], [batch])
        train(left, optimizers[1], [batch])
    assert all(torch.equal(a, b) for a, b in zip(weights_of(touched), weights_of(left), strict=True))
    assert "changed outside" not in caplog.text


def test_a_changed_frozen_entry_leaves_the_snapshot_of_updated_ones(make_model, batches):
    model = make_model(variant="mix", stage_steps=3)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(5))
    tracked = controller_of(model).weights[0]
    before, updated = tracked.frozen.snapshot.clone(), keep_of(tracked).bool()
    with torch.no_grad():
        tracked.weight.view(-1)[(~updated).view(-1).nonzero()[0]] += 1.0
    train(model, optimizer, batches(1))
    assert torch.equal(tracked.frozen.snapshot[updated], before[updated])
    assert not torch.equal(tracked.frozen.snapshot[~updated], before[~updated])


def test_values_loaded_into_an_unused_layer_stay(make_model, batches):
    model = make_model(stage_steps=1)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(2))
    with torch.no_grad():
        weights_of(model)[1].fill_(7.0)
    optimizer.zero_grad()
    layers_of(model)[0](batches(1)[0][0]).sum().backward()
    clock = controller_of(model).clock
    clock._resolved, clock.step = Cycle(10), 10  # stay in this stage
    optimizer.step()
    assert (weights_of(model)[1] == 7.0).all()


def test_large_half_precision_gradients_are_scored(make_net, batches):
    net = make_net().half()
    model = get_peft_model(net, DPSConfig(target_modules=["layers.0"], stage_steps=2), autocast_adapter_dtype=False)
    weight = layers_of(model)[0].dps_weight["default"]
    assert weight.dtype is torch.float16
    weight.grad = torch.full_like(weight, 60000.0)
    SGD([weight], lr=1e-6).step()
    status = model.dps_status()
    assert (status.steps, status.unscored_steps) == (1, 0)
    assert controller_of(model).weights[0].gathered.total.dtype is torch.float32


def test_layers_that_are_gone_are_forgotten(make_model, batches):
    model = make_model(sizes=(12, 12, 12), stage_steps=2)
    net = model.base_model.model
    net.layers = net.layers[:1]
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(3))
    assert list(model.dps_status().layers) == ["layers.0"]
    assert copy.deepcopy(model).dps_status() == model.dps_status()


@pytest.mark.parametrize("failing", ["mask", "hold"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_a_switch_without_memory_is_repeated_whole(make_model, batches, monkeypatch, variant, scope, frozen, failing):
    fields = {"variant": variant, "scope": scope, "frozen": frozen, "stage_steps": 2}
    broken, whole = make_model(**fields), make_model(**fields)
    ours, theirs = (AdamW(trainable(model), lr=1e-2, weight_decay=0.1) for model in (broken, whole))
    data = batches(4)
    train(broken, ours, data[:2])
    place, name = (Mask, "of") if failing == "mask" else (FrozenWeight, "__init__")
    working, calls = getattr(place, name), []

    def fails_at_the_second_weight(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return working(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fails_at_the_second_weight)
        with pytest.raises(MemoryError):
            train(broken, ours, data[2:])
    train(whole, theirs, data[:2])
    with torch.no_grad():
        for weight in (*weights_of(broken), *weights_of(whole)):  # held are the values that the repetition finds
            weight.mul_(1.5)
    train(broken, ours, data[2:])
    train(whole, theirs, data[2:])
    assert not broken.dps_status().frozen_moved or frozen == "gradient"
    for one, two in zip(controller_of(broken).weights, controller_of(whole).weights, strict=True):
        assert torch.equal(keep_of(one), keep_of(two))
        assert torch.equal(one.weight, two.weight)


def test_frozen_bits_that_could_not_be_copied_are_held_when_the_step_is_repeated(make_model, batches, monkeypatch):
    model = make_model(stage_steps=2)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    data = batches(4)
    train(model, optimizer, data[:2])
    before = [bits(weight) for weight in weights_of(model)]

    def no_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(frozen_policy, "hold_frozen", no_memory)
        with pytest.raises(MemoryError):
            train(model, optimizer, data[2:3])
    train(model, optimizer, data[2:])
    for weight, old in zip(controller_of(model).weights, before, strict=True):
        frozen = ~keep_of(weight).bool()
        assert torch.equal(bits(weight.weight)[frozen], old[frozen])


def test_a_change_from_outside_is_told_once(make_model, batches, caplog):
    model = make_model(stage_steps=4)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(5))
    with torch.no_grad():
        weights_of(model)[0].add_(1.0)
    for batch in batches(3):
        with torch.no_grad():
            weights_of(model)[0].add_(0.0)  # no other bits, but another version
        train(model, optimizer, [batch])
    assert caplog.text.count("were changed outside of the optimizer") == 1
    assert model.dps_status().frozen_moved


def test_scores_of_several_dtypes_cannot_be_ranked_together(make_net, batches):
    net = make_net()
    net.layers[1].double()
    everything, half = (
        get_peft_model(
            copy.deepcopy(net), DPSConfig(target_modules=["layers.0", "layers.1"], scope="model", density=density)
        )
        for density in (1.0, 0.5)
    )
    for model in (everything, half):
        model.set_dps_total_steps(40)
        weights_of(model)[0].grad = torch.ones_like(weights_of(model)[0])
    SGD(weights_of(everything)[:1], lr=0.1).step()  # nothing is ranked
    with pytest.raises(
        ConfigError, match=r"float32 for 'layers.0' and torch.float64 for 'layers.1'. Use `scope='tensor'`"
    ):
        SGD(weights_of(half)[:1], lr=0.1).step()


class Towers(nn.Module):
    def __init__(self, left, right) -> None:
        super().__init__()
        self.left, self.right = left, right


def test_two_adapters_of_one_name_are_told_apart_or_refused(make_model, batches):
    towers = Towers(make_model(), make_model(net_seed=1))
    optimizer = SGD(trainable(towers), lr=0.1)
    for x, y in batches(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(towers.left(x) + towers.right(x), y).backward()
        optimizer.step()
    assert [dps_adapter(tower).status().steps for tower in (towers.left, towers.right)] == [3, 3]
    message = r"Two DPS adapters of this model are called 'default': .*'left.base_model.model.layers.0'.*'right.base"
    for ask in (dps_adapter, find_trained):
        with pytest.raises(ConfigError, match=message):
            ask(towers)
    towers.right.requires_grad_(False)
    assert list(find_trained(towers)) == ["default"]


def test_what_keeps_the_controller_of_a_deleted_adapter_keeps_it_out_of_the_new_one(make_model, batches):
    model = make_model(stage_steps=2)
    train(model, AdamW(trainable(model), lr=1e-2), batches(3))
    old = controller_of(model)  # as a traceback would
    model.add_adapter("other", DPSConfig(target_modules=["layers.0", "layers.1"], stage_steps=10))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", DPSConfig(target_modules=["layers.0", "layers.1"], stage_steps=10))
    model.set_adapter("default")
    before = [bits(weight) for weight in weights_of(model)]
    train(model, AdamW(trainable(model), lr=1e-2), batches(1))
    assert old.clock.step == 3
    assert not any(weight.exists() for weight in old.weights)
    for weight, then in zip(weights_of(model), before, strict=True):
        assert (bits(weight) != then).all()


def test_layers_that_the_user_froze_may_be_loaded(make_model, batches):
    model = make_model()
    layers_of(model)[0].requires_grad_(False)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for batch in batches(4):
        train(model, optimizer, [batch])
        state = copy.deepcopy(model.state_dict())
        model.load_state_dict({name: 0.9 * tensor for name, tensor in state.items()})  # averaged ones, for a look
        model.load_state_dict(state)
    assert model.dps_status().engaged


def test_a_new_training_keeps_no_memory_of_the_one_before(make_model, batches):
    model = make_model()
    train(model, AdamW(trainable(model), lr=1e-2), batches(3))
    model.set_dps_total_steps(10)
    weights = controller_of(model).weights
    parts = [part for weight in weights for part in (weight, weight.gathered, weight.noise)]
    held = [value for part in parts for value in vars(part).values()]
    assert not [value for value in held if isinstance(value, (torch.Tensor, FrozenWeight))]
