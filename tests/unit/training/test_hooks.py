from __future__ import annotations

import inspect
import threading
import weakref

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import _global_optimizer_pre_hooks

from peft_dps import Stage
from peft_dps.errors import EngineError, ScoreError
from peft_dps.training import hooks
from peft_dps.training.copied_weight import CopiedWeight as TargetWeight
from tests.device import DEVICE
from tests.unit.conftest import controller_of, keep_of, layers_of, train, trainable, weights_of

pytestmark = pytest.mark.device

DENSE_GRADIENT_OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    if name not in ("LBFGS", "SparseAdam")  # refused, and for sparse gradients only
)


def backward(model, batch):
    x, y = batch
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def copies(model):
    return [weight.detach().clone() for weight in weights_of(model)]


def train_by_hand(model, data, through_data=False):
    for batch in data:
        backward(model, batch)
        with torch.no_grad():
            for parameter in trainable(model):
                (parameter.data if through_data else parameter).sub_(0.1 * parameter.grad)
        model.zero_grad()


def assert_frozen_bits_kept(model, before):
    for weight, old in zip(controller_of(model).weights, before, strict=True):
        frozen = ~keep_of(weight).bool()
        assert frozen.any()
        assert torch.equal(weight.weight.detach().view(torch.int32)[frozen], old.view(torch.int32)[frozen])


@pytest.mark.parametrize("name", DENSE_GRADIENT_OPTIMIZERS)
def test_no_frozen_entry_changes_a_bit_in_any_optimizer_of_torch(make_model, batches, name):
    model = make_model(stage_steps=3, density=0.3)
    cls = getattr(torch.optim, name)
    decay = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(cls).parameters else {}
    parameters = weights_of(model) if name == "Muon" else trainable(model)  # Muon takes matrices only
    optimizer = cls(parameters, lr=1e-2, **decay)
    data = batches(6)
    train(model, optimizer, data[:3])
    before = copies(model)
    train(model, optimizer, data[3:])
    assert controller_of(model).clock.step == 6
    assert_frozen_bits_kept(model, before)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(model), strict=True))


def test_gradient_policy_lets_momentum_and_decay_move_frozen_entries(make_model, batches):
    model = make_model(frozen="gradient")
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, batches(2))
    before = copies(model)
    train(model, optimizer, batches(1))
    frozen = ~keep_of(controller_of(model).weights[0]).bool()
    assert (weights_of(model)[0].grad[frozen] == 0).all()
    assert not torch.equal(weights_of(model)[0][frozen], before[0][frozen])


def test_gradient_accumulation_scores_the_sum_and_counts_one_step(make_model, batches):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    for batch in batches(4):
        backward(model, batch)
    optimizer.step()
    assert controller_of(model).clock.step == 1
    assert torch.equal(controller_of(model).weights[0].gathered.total, weights_of(model)[0].grad ** 2)


def test_clipping_comes_before_scoring(make_model, batches):
    model = make_model()
    backward(model, batches(1)[0])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    SGD(trainable(model), lr=0.1).step()
    total = sum(weight.gathered.total.sum() for weight in controller_of(model).weights)
    assert 0 < total <= 1e-6


def test_nested_steps_are_one(make_model, batches):
    class Subclass(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, {})

        def step(self, closure=None):
            self.inner.step()
            with torch.no_grad():  # moves every entry, after the inner step's own hook
                for weight in self.param_groups[0]["params"]:
                    weight.add_(1e-3)

    for make in (Subclass, lambda parameters: Wrapper(Subclass(parameters))):
        model = make_model()
        optimizer = make(trainable(model))
        train(model, optimizer, batches(2))
        before = copies(model)
        train(model, optimizer, batches(2))
        assert controller_of(model).clock.step == 4
        assert controller_of(model).weights[0].observed == 2
        assert_frozen_bits_kept(model, before)
        assert not hooks._open.steps


def test_an_exception_in_a_step_loses_neither_count_nor_frozen_bits(make_model, batches):
    class Failing(AdamW):
        fail = False

        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for weight in group["params"]:
                        weight.add_(1.0)
            if self.fail:
                raise MemoryError

    model = make_model()
    optimizer = Failing(trainable(model))
    train(model, optimizer, batches(2))
    before = copies(model)
    optimizer.fail = True
    backward(model, batches(1)[0])
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fail = False
    train(model, optimizer, batches(1))
    assert controller_of(model).clock.step == 4
    assert_frozen_bits_kept(model, before)
    assert not hooks._open.steps


def test_an_inner_step_that_raises_and_is_caught_does_not_confuse_the_outer(make_model, batches):
    class Inner(SGD):
        def step(self, closure=None):
            raise ArithmeticError

    class Outer(SGD):
        def step(self, closure=None):
            with pytest.raises(ArithmeticError):
                Inner(self.param_groups[0]["params"], lr=1.0).step()
            super().step(closure)

    model = make_model()
    optimizer = Outer(trainable(model), lr=0.1, momentum=0.9)
    train(model, optimizer, batches(2))
    before = copies(model)
    train(model, optimizer, batches(2))
    assert controller_of(model).clock.step == 4
    assert_frozen_bits_kept(model, before)
    assert not hooks._open.steps


def test_several_optimizers_make_one_step(make_model, batches):
    together, apart = make_model(), make_model()
    one = SGD(trainable(together), lr=0.1, momentum=0.9)
    many = [SGD([parameter], lr=0.1, momentum=0.9) for parameter in trainable(apart)]
    for batch in batches(6):
        train(together, one, [batch])
        apart.zero_grad()
        backward(apart, batch)
        for optimizer in many:
            optimizer.step()
    assert apart.dps_status() == together.dps_status()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(together), weights_of(apart), strict=True))


def test_optimizers_stepping_in_backward_make_one_step(make_model, batches):
    together, apart = make_model(), make_model()
    one = SGD(trainable(together), lr=0.1, momentum=0.9)
    for parameter in trainable(apart):
        own = SGD([parameter], lr=0.1, momentum=0.9)

        def step_now(parameter, own=own):
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(step_now)
    for batch in batches(6):
        train(together, one, [batch])
        backward(apart, batch)
    assert apart.dps_status() == together.dps_status()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(together), weights_of(apart), strict=True))


def test_skipped_and_foreign_steps_do_not_tick(make_model, make_net, batches):
    model, other = make_model(), make_net()
    optimizer, foreign = AdamW(trainable(model)), AdamW(other.parameters())
    train(other, foreign, batches(3))
    optimizer.step()  # without gradients
    assert controller_of(model).clock.step == 0


def test_making_optimizer_state_for_a_checkpoint_does_not_tick(make_model, batches):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make_model()
    optimizer = AdamW(trainable(model))
    before = copies(model)
    assert get_optimizer_state_dict(model, optimizer)["state"]
    assert controller_of(model).clock.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model), strict=True))
    train(model, optimizer, batches(1))
    assert controller_of(model).clock.step == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_leaves_scores_unscaled(make_model, batches, fused, unscale):
    plain, scaled = make_model(stage_steps=3), make_model(stage_steps=3)
    first = AdamW(trainable(plain), lr=0.0)
    second = AdamW(trainable(scaled), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    train(plain, first, batches(2))
    for x, y in batches(2):
        second.zero_grad()
        scaler.scale(nn.functional.cross_entropy(scaled(x), y)).backward()
        if unscale:
            scaler.unscale_(second)
        scaler.step(second)
        scaler.update()
    for ours, expected in zip(controller_of(scaled).weights, controller_of(plain).weights, strict=True):
        torch.testing.assert_close(ours.gathered.total, expected.gathered.total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflowed_are_neither_scored_nor_counted(make_model, batches, fused):
    model = make_model(stage_steps=3)
    optimizer = AdamW(trainable(model), fused=fused)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for step, (x, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step == 1:
            weights_of(model)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    status = model.dps_status()
    assert (status.steps, status.unscored_steps) == (2, 0)
    assert all(torch.isfinite(weight).all() for weight in weights_of(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_engages(make_model, batches):
    torch._dynamo.reset()
    plain, compiled = make_model(), make_model()
    first, second = (SGD(trainable(model), lr=0.1) for model in (plain, compiled))
    step = torch.compile(second.step, backend="eager")
    for batch in batches(5):
        train(plain, first, [batch])
        second.zero_grad()
        backward(compiled, batch)
        step()
    assert compiled.dps_status() == plain.dps_status()
    rounding = 0 if Version(torch.__version__) >= Version("2.13") else 1e-7  # of torch 2.6 to 2.11
    for ours, theirs in zip(weights_of(compiled), weights_of(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding)


def test_two_threads_train_two_models(make_model, batches):
    alone, data = make_model(), batches(12)
    train(alone, AdamW(trainable(alone), lr=1e-2), data)
    models = [make_model(), make_model()]
    threads = [
        threading.Thread(target=train, args=(model, AdamW(trainable(model), lr=1e-2), data)) for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        assert model.dps_status() == alone.dps_status()
        assert all(torch.equal(a, b) for a, b in zip(weights_of(alone), weights_of(model), strict=True))


def test_installing_twice_keeps_one_pair_of_hooks(make_model, batches):
    hooks.install()
    hooks.install()
    model = make_model()
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    assert controller_of(model).clock.step == 1
    assert sum(hook is hooks.before_step for hook in _global_optimizer_pre_hooks.values()) == 1


@pytest.mark.parametrize("through_data", [False, True])
def test_training_that_shows_no_step_is_an_error(make_model, batches, through_data):
    model = make_model()
    with pytest.raises(EngineError, match="changed twice without an optimizer step"):
        train_by_hand(model, batches(5), through_data)


def test_an_engine_that_takes_over_later_is_noticed(make_model, batches):
    model = make_model()
    data = batches(6)
    train(model, SGD(trainable(model), lr=0.1), data[:1])
    with pytest.raises(EngineError, match="changed twice"):
        train_by_hand(model, data[1:])


def test_forwards_without_steps_are_no_alarm(make_model, batches):
    model = make_model()
    for batch in batches(6):
        backward(model, batch)
    model.eval()
    for layer in layers_of(model):
        with torch.no_grad():
            layer.dps_weight["default"].add_(1e-3)
    with torch.no_grad():
        for x, _ in batches(6):
            model(x)
    assert controller_of(model).stage is None


def test_stages_alternate_over_cycles(make_model, batches):
    model = make_model(stage_steps=2)
    optimizer, seen = SGD(trainable(model), lr=0.1), []
    for batch in batches(9):
        train(model, optimizer, [batch])
        status = model.dps_status()
        seen.append((status.cycle, status.stage, status.step_in_stage))
    assert seen[:5] == [
        (1, Stage.ACCUMULATE, 1),
        (1, Stage.ACCUMULATE, 2),
        (1, Stage.SUBNETWORK, 1),
        (1, Stage.SUBNETWORK, 2),
        (2, Stage.ACCUMULATE, 1),
    ]
    assert seen[8] == (3, Stage.ACCUMULATE, 1)


def test_a_step_that_failed_on_a_deleted_adapter_disturbs_nobody(make_model, batches):
    class Failing(SGD):
        def step(self, closure=None):
            raise MemoryError

    model, other = make_model(), make_model()
    backward(model, batches(1)[0])
    with pytest.raises(MemoryError):
        Failing(trainable(model), lr=0.1).step()
    model.delete_adapter("default")
    train(other, SGD(trainable(other), lr=0.1), batches(3))
    assert other.dps_status().steps == 3


def test_skipped_steps_of_a_fused_optimizer_are_no_alarm(make_model, batches):
    model = make_model(stage_steps=2)
    optimizer = AdamW(trainable(model), fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for step, (x, y) in enumerate(batches(8)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if 2 < step < 7:  # in SUBNETWORK, where every step writes to the weights
            weights_of(model)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert model.dps_status().steps == 4


def test_parameters_that_join_an_optimizer_later_are_found(make_model, batches):
    model = make_model()
    optimizer = SGD(weights_of(model)[:1], lr=0.1)
    train(model, optimizer, batches(1))
    optimizer.add_param_group({"params": weights_of(model)[1:]})
    train(model, optimizer, batches(1))
    assert [weight.observed for weight in controller_of(model).weights] == [2, 1]


def test_an_optimizer_keeps_no_model_alive(make_model, batches):
    model, other = make_model(), make_model()
    optimizer = SGD([*trainable(model), *trainable(other)], lr=0.1)
    train(model, optimizer, batches(1))
    gone = weakref.ref(controller_of(other))
    del other
    assert gone() is None
    train(model, optimizer, batches(1))
    assert controller_of(model).clock.step == 2


@pytest.mark.refuses(
    "Training", "copies: DeepSpeed ZeRO-1, 2 and 3 (by its marks on parameters)", "it steps copies of its own"
)
@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeed_zero_is_refused_by_name_in_the_first_forward(mark, make_model, batches):
    model = make_model()
    flat = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights_of(model)]))
    optimizer = AdamW([flat], lr=1e-2)  # what ZeRO's inner optimizer holds
    for weight in weights_of(model):
        setattr(weight, mark, None)
    with pytest.raises(EngineError, match="DeepSpeed"):
        train(model, optimizer, batches(1))


@pytest.mark.parametrize("fields", [{}, {"lean": True}, {"variant": "mix"}], ids=str)
def test_an_interrupt_while_frozen_bits_are_given_back_loses_none(make_model, batches, monkeypatch, fields, caplog):
    model = make_model(**fields)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.5)
    train(model, optimizer, batches(3))
    before, give_back, calls = copies(model), TargetWeight.after_step, []

    def interrupted(self, optimizer):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        give_back(self, optimizer)

    monkeypatch.setattr(TargetWeight, "after_step", interrupted)
    backward(model, batches(1)[0])
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    stack = hooks._stack()
    hooks._close_abandoned(stack)  # as the next step does
    assert not hooks._open.steps
    assert_frozen_bits_kept(model, before)
    assert not model.dps_status().frozen_moved
    assert not caplog.text


def test_any_later_step_lets_go_of_what_a_failed_one_held(make_model, make_net, batches):
    class Failing(AdamW):
        def step(self, closure=None):
            raise MemoryError

    model, other = make_model(), make_net()
    backward(model, batches(1)[0])
    with pytest.raises(MemoryError):
        Failing(trainable(model)).step()
    assert hooks._open.steps
    SGD(other.parameters(), lr=0.1).step()
    assert not hooks._open.steps


@pytest.mark.parametrize("lean", [False, True])
def test_frozen_bits_are_those_before_an_optimizer_that_moves_weights_and_then_asks_for_gradients(
    make_model, batches, lean
):
    class LookingAhead(AdamW):
        def step(self, closure):
            with torch.no_grad():
                for weight in self.param_groups[0]["params"]:
                    weight.add_(0.01)
            return super().step(closure)

    model = make_model(lean=lean)
    optimizer, data = LookingAhead(trainable(model), lr=1e-2), batches(4)

    def step(batch):
        model.zero_grad()
        optimizer.step(lambda: backward(model, batch))

    for batch in data[:3]:
        step(batch)
    before = copies(model)
    step(data[3])
    assert_frozen_bits_kept(model, before)


def test_a_bad_step_of_several_optimizers_is_counted_and_told_once(make_model, batches, caplog):
    model = make_model(stage_steps=3)
    optimizers = [SGD([parameter], lr=0.1) for parameter in trainable(model)]
    for number, batch in enumerate(batches(3)):
        model.zero_grad()
        backward(model, batch)
        for parameter in trainable(model):
            if number == 0:
                parameter.grad.fill_(torch.nan)
        for optimizer in optimizers:
            if number > 0:
                optimizer.step()
            else:
                hooks.before_step(optimizer, (optimizer,), {})
                hooks._open.steps.clear()
    status = model.dps_status()
    assert (status.steps, status.unscored_steps) == (3, 1)
    assert controller_of(model).clock.scored_steps == 2
    assert caplog.text.count("are not finite") == 1


def test_a_weight_whose_gradients_were_never_finite_is_named(make_model, batches):
    model = make_model()
    optimizers = [SGD([parameter], lr=0.0) for parameter in trainable(model)]
    for batch in batches(2):
        model.zero_grad()
        backward(model, batch)
        weights_of(model)[1].grad.fill_(torch.inf)
        for optimizer in optimizers:
            if optimizer.param_groups[0]["params"][0] is weights_of(model)[1]:
                hooks.before_step(optimizer, (optimizer,), {})
                hooks._open.steps.clear()
            else:
                optimizer.step()
    backward(model, batches(1)[0])
    with pytest.raises(ScoreError, match=r"no gradient of 'layers.1' in the ACCUMULATE stage that ended with step 2"):
        optimizers[0].step()


def test_a_step_inside_another_one_on_other_weights_is_part_of_it(make_model, batches):
    class Both(SGD):
        def __init__(self, parameters, inner):
            super().__init__(parameters, lr=0.1)
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()
            return super().step(closure)

    model, twin = make_model(), make_model()
    nested = Both(trainable(model)[2:], SGD(trainable(model)[:2], lr=0.1))
    plain = SGD(trainable(twin), lr=0.1)
    for batch in batches(6):
        for each, optimizer in ((model, nested), (twin, plain)):
            each.zero_grad()
            backward(each, batch)
            optimizer.step()
    assert controller_of(model).clock.step == 6
    for one, two in zip(controller_of(model).weights, controller_of(twin).weights, strict=True):
        assert one.selected == two.selected
        assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_step_hooks_of_an_optimizer_are_warned_of_once(make_model, batches, caplog, kind):
    model = make_model()
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(1))
    assert "step hooks of its own" not in caplog.text
    getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: None)
    train(model, optimizer, batches(2))
    assert caplog.text.count("SGD has step hooks of its own") == 1
