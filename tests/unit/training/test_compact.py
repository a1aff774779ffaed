"""Compact storage trains what a copy with the same mask does, and selects what a slow reference selects."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import SGD, Adafactor, AdamW

from peft_dps import dps_adapter, register_score
from peft_dps.errors import ConfigError, EngineError, ScoreError, StateError
from peft_dps.selection.scores import SCORES
from tests.compact import TARGETS, deltas_of, loss_of, make_base, make_batches, make_model, train, trainable

pytestmark = pytest.mark.device

KINDS = [
    ("column", "tensor"), ("row", "tensor"), ("entry", "tensor"),
    ("column", "model"), ("row", "model"), ("entry", "model"), ("tensor", "model"), ("block", "model"),
    ("submatrix", "model"), ("tile", "tensor"), ("tile", "model"),
]  # fmt: skip
SCORED_BEFORE = {"schedule": "once", "score_steps": 0}


def weights_in_effect(model) -> dict[str, torch.Tensor]:
    return {name: model.base_model.model.get_submodule(name).weight.detach().clone() for name in TARGETS}


@pytest.mark.parametrize(("granularity", "scope"), KINDS)
@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "dtype", "tolerance"),
    [
        (lambda own: SGD(own, 0.5, momentum=0.9), torch.float64, 1e-10),
        (lambda own: AdamW(own, 1e-2, weight_decay=0.0), torch.float32, 1e-6),
    ],
    ids=["sgd", "adamw"],
)  # fmt: skip
def test_it_trains_what_a_copy_with_the_same_mask_does(granularity, scope, train_bias, optimizer, dtype, tolerance):
    batches, models = make_batches(9), []
    for storage in ("copy", "compact"):
        fields = {"storage": storage, "granularity": granularity, "scope": scope, "train_bias": train_bias}
        model = make_model(make_base(dtype), **fields, **SCORED_BEFORE)
        model.base_model.dps_score(batches[:3], loss_of)
        models.append((model, optimizer(trainable(model))))
    for batch in batches[3:]:
        losses = []
        for model, own in models:
            own.zero_grad()
            losses.append(loss_of(model, batch))
            losses[-1].backward()
            own.step()
        torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
        ours, theirs = (weights_in_effect(model) for model, _ in models)
        for name in TARGETS:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
    copy, compact = (model.base_model.dps_status() for model, _ in models)
    assert copy.selected == compact.selected > 0


def reference_selection(granularity: str, batches, density: float) -> dict[str, set[int]]:
    """Select rows or columns of each layer by sums of the squared gradients of a plain model, entry by entry."""
    model = make_base()
    sums = {name: torch.zeros_like(model.get_submodule(name).weight) for name in TARGETS}
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, total in sums.items():
            total += model.get_submodule(name).weight.grad ** 2
    chosen = {}
    for name, total in sums.items():
        out_first = total.t() if name == "transposed" else total
        size = out_first.shape[0] if granularity == "row" else out_first.shape[1]
        scores = []
        for unit in range(size):
            entries = out_first[unit] if granularity == "row" else out_first[:, unit]
            scores.append(sum(entries.reshape(-1).tolist()) / entries.numel())
        best = sorted(range(size), key=lambda unit: (-scores[unit], unit))
        chosen[name] = set(best[: math.ceil(size * density)])
    return chosen


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_it_selects_what_a_slow_reference_selects(granularity):
    batches = make_batches(4)
    model = make_model(granularity=granularity, schedule="once", score_steps=3, train_bias=False)
    train(model, SGD(trainable(model), 0.1), batches)
    found = {name: set(delta.index.tolist()) for name, delta in deltas_of(model).items()}
    assert found == reference_selection(granularity, batches[:3], 0.3)


def test_scoring_changes_nothing_and_leaves_no_state():
    model, batches = make_model(schedule="once", score_steps=3, train_bias=False), make_batches(4)
    optimizer = AdamW(trainable(model), 1e-2)
    before = loss_of(model, batches[0]).item()
    train(model, optimizer, batches[:3])
    assert loss_of(model.eval(), batches[0]).item() == before
    assert not optimizer.state
    train(model.train(), optimizer, batches[3:])
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_the_base_is_never_written():
    model, base = make_model(schedule="every", score_steps=1, stage_steps=3), make_base()
    train(model, AdamW(trainable(model), 1e-2), make_batches(10))
    for name in TARGETS:
        assert torch.equal(
            model.base_model.model.get_submodule(name).get_base_layer().weight, base.get_submodule(name).weight
        )


def test_units_that_stay_keep_their_state_and_new_ones_begin_with_none():
    model = make_model(schedule="every", score_steps=1, stage_steps=3, train_bias=False)
    optimizer = AdamW(trainable(model), 1e-2)
    batches = make_batches(7)
    train(model, optimizer, batches[:4])
    before = {
        name: (delta.index.tolist(), optimizer.state[delta.weight]["exp_avg"].clone())
        for name, delta in deltas_of(model).items()
    }
    optimizer.zero_grad()
    loss_of(model, batches[4]).backward()  # its forward selects
    selected = {name: delta.index.tolist() for name, delta in deltas_of(model).items()}
    gradients = {name: delta.weight.grad.clone() for name, delta in deltas_of(model).items()}
    optimizer.step()
    changed = 0
    for name, delta in deltas_of(model).items():
        index, average = before[name]
        after = optimizer.state[delta.weight]["exp_avg"]
        for slot, unit in enumerate(selected[name]):
            own = (
                average.select(delta.axis, slot)
                if index[slot] == unit
                else torch.zeros_like(average.select(delta.axis, slot))
            )
            changed += index[slot] != unit
            expected = 0.9 * own + 0.1 * gradients[name].select(delta.axis, slot)
            torch.testing.assert_close(after.select(delta.axis, slot), expected, rtol=1e-12, atol=1e-15)
    assert changed, "some units were selected anew"


def test_an_optimizer_whose_state_has_another_shape_is_refused_by_name():
    model = make_model(schedule="every", score_steps=1, stage_steps=2, target_modules=["linear"], seed=3)
    optimizer = Adafactor(trainable(model), 1e-2)
    with pytest.raises(EngineError, match=r"Adafactor keeps 'row_var' as .* Use an optimizer .* select once"):
        train(model, optimizer, make_batches(12))


def test_an_adapter_holds_no_more_units_than_it_may():
    free = make_model(schedule="every", score_steps=1, stage_steps=2)
    bound = make_model(schedule="every", score_steps=1, stage_steps=2, max_density=0.4)
    for model in (free, bound):
        train(model, AdamW(trainable(model), 5e-2), make_batches(24))
    held = {name: len(delta.held) / delta.units.count for name, delta in deltas_of(bound).items()}
    assert all(
        share <= math.ceil(0.4 * delta.units.count) / delta.units.count
        for share, delta in zip(held.values(), deltas_of(bound).values(), strict=True)
    )
    assert any(len(delta.held) > math.ceil(0.4 * delta.units.count) for delta in deltas_of(free).values())


@pytest.mark.parametrize("granularity", ["entry", "column", "row", "tile", "tensor"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_scores_of_weights_select_what_a_copy_selects(granularity, scope):
    if (granularity, scope) == ("tensor", "tensor"):
        return
    fields = {"score": "magnitude", "granularity": granularity, "scope": scope, "train_bias": False, **SCORED_BEFORE}
    masks = []
    for storage in ("copy", "compact"):
        model = make_model(**fields, storage=storage)
        train(model, SGD(trainable(model), 0.1), make_batches(1))
        masks.append(dps_adapter(model).masks())
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


@pytest.mark.parametrize("storage", ["copy", "compact"])
@pytest.mark.parametrize("score", ["random", "magnitude"])
def test_weights_may_be_written_before_the_first_step_as_ddp_does(storage, score):
    model = make_model(storage=storage, score=score, **SCORED_BEFORE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    train(model, SGD(trainable(model), 0.1), make_batches(2))
    assert model.base_model.dps_status().engaged


def test_scores_see_the_weight_as_trained():
    seen = []

    @register_score("seen", evidence="none")
    def see(context):
        seen.append((context.weight - context.base_weight).abs().sum().item())
        return (context.weight - context.base_weight).abs()

    try:
        model = make_model(
            score="seen", schedule="every", score_steps=1, stage_steps=2, target_modules=["linear"], density=0.5
        )
        train(model, SGD(trainable(model), 0.1), make_batches(6))
    finally:
        SCORES.unregister("seen")
    assert seen[0] == 0.0
    assert all(moved > 0 for moved in seen[1:])
    assert len(seen) == 3


@pytest.mark.parametrize("fields", [{"score": "magnitude"}, {"score": "random", "granularity": "tile"}])
def test_an_adapter_holds_no_more_units_than_it_may_whatever_the_score(fields):
    model = make_model(schedule="every", score_steps=1, stage_steps=2, max_density=0.4, **fields)
    train(model, AdamW(trainable(model), 5e-2), make_batches(16))
    for delta in deltas_of(model).values():
        assert 0 < len(delta.held) <= math.ceil(0.4 * delta.units.count)


def test_an_unselected_block_has_neither_gradient_nor_state_and_none_below_is_computed():
    model = make_model(granularity="tensor", scope="model", density=0.05, train_bias=False, **SCORED_BEFORE)
    batches = make_batches(4)
    model.base_model.dps_score(batches[:2], loss_of)
    optimizer = AdamW(trainable(model), 1e-2)
    train(model, optimizer, batches[2:])
    trained = [name for name, delta in deltas_of(model).items() if delta.slots]
    assert 0 < len(trained) == len(optimizer.state) < len(TARGETS)
    lowest = min(TARGETS.index(name) for name in trained)
    assert lowest > 0
    outputs = []
    below = model.base_model.model.get_submodule(TARGETS[lowest - 1])
    handle = below.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    loss_of(model, batches[0]).backward()
    handle.remove()
    assert not outputs[0].requires_grad


def test_units_is_a_rank():
    model = make_model(units=2, schedule="once", score_steps=1)
    train(model, AdamW(trainable(model), 1e-2), make_batches(3))
    assert {delta.slots for delta in deltas_of(model).values()} == {2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "mix"}, "`storage='compact'` does not go with `variant='mix'`"),
        ({"lean": True}, "`storage='compact'` does not go with `lean=True`"),
        ({"offload_base": True}, "`storage='compact'` does not go with `offload_base=True`"),
        ({"frozen": "gradient"}, "`storage='compact'` does not go with `frozen='gradient'`"),
        ({"evidence": "second_moment"}, "`storage='compact'` does not go with `evidence='second_moment'`"),
        ({"granularity": "entry", "units": 4}, "`units=4` is a number of rows or columns .* `granularity` is 'entry'"),
        ({"scope": "model", "units": 4}, "`units=4` is a number of rows or columns .* `scope` is 'model'"),
        ({"units": 0}, "`units` must be an integer of at least 1, got 0"),
        ({"units": 1.5}, "`units` must be an integer of at least 1, got 1.5"),
        ({"units": 11}, "The target 'embedding': `units` is 11, and a weight has only 8 of them"),
        ({"max_density": 0.1}, "`max_density` must be at least `density`, got 0.1 and 0.3"),
        ({"units": 6, "max_density": 0.25}, "`max_density=0.25` lets an adapter hold"),
        ({"score_dtype": "bfloat16"}, "`storage='compact'` does not go with `score_dtype='bfloat16'`"),
        ({"max_density": 2}, r"`max_density` must be in \(0, 1\], got 2"),
        ({"storage": "copy", "max_density": 0.5}, "`max_density=0.5` bounds what `storage='compact'` holds"),
        ({"storage": "dense"}, "`storage` must be one of 'copy', 'compact', got 'dense'"),
        ({"schedule": "every", "stage_steps": 4, "score_steps": 4}, "`score_steps` must be less than `stage_steps`"),
        ({"schedule": "every", "stage_steps": 4, "score_steps": 0}, "selects without a step in which"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_model(**fields)


def test_gradients_that_are_not_finite_are_not_scored(caplog):
    model, batches = make_model(schedule="once", score_steps=2, train_bias=False), make_batches(4)
    optimizer = SGD(trainable(model), 0.1)
    optimizer.zero_grad()
    (loss_of(model, batches[0]) * math.inf).backward()
    optimizer.step()
    train(model, optimizer, batches[1:])
    assert model.base_model.dps_status().unscored_steps == 1
    assert "are not finite; the step is counted but not scored" in caplog.text
    found = {name: set(delta.index.tolist()) for name, delta in deltas_of(model).items()}
    assert found == reference_selection("column", batches[1:2], 0.3)


def test_no_scored_step_is_an_error():
    model, batches = make_model(**SCORED_BEFORE), make_batches(1)
    with pytest.raises(ScoreError, match=r"call `model.dps_score\(batches\)` before training"):
        train(model, SGD(trainable(model), 0.1), batches)


def test_batches_are_scored_in_one_call():
    model, batches = make_model(**SCORED_BEFORE), make_batches(2)
    model.base_model.dps_score(batches[:1], loss_of)
    with pytest.raises(ConfigError, match=r"batches have been scored already. Give all of them in one call"):
        model.base_model.dps_score(batches[1:], loss_of)
    with pytest.raises(ConfigError, match="with `schedule='once'` and `score_steps=0` only"):
        make_model(schedule="once", score_steps=8).base_model.dps_score([], loss_of)


def test_several_optimizers_leave_a_state_that_loads():
    model, batches = make_model(schedule="once", score_steps=3, train_bias=False), make_batches(2)
    own = trainable(model)
    optimizers = [SGD(own[:2], 0.1), SGD(own[2:], 0.1)]
    for batch in batches:
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert {layer.observed for layer in model.base_model.dps_status().layers.values()} == {2}
    model.base_model.load_dps_state_dict(model.base_model.dps_state_dict())


def test_the_state_is_saved_after_the_step_that_moves_units():
    model = make_model(schedule="every", score_steps=1, stage_steps=3, train_bias=False)
    optimizer, batches = AdamW(trainable(model), 1e-2), make_batches(5)
    train(model, optimizer, batches[:4])
    loss_of(model, batches[4]).backward()  # its forward selects anew
    with pytest.raises(StateError, match=r"Save the training state after `optimizer.step\(\)`"):
        model.base_model.dps_state_dict()
    optimizer.step()
    assert model.base_model.dps_state_dict()["header"]["clock"]["step"] == 5


def test_a_frozen_adapter_takes_no_part_in_training():
    for fields in ({"schedule": "once", "score_steps": 3}, {"score": "random", **SCORED_BEFORE}, SCORED_BEFORE):
        model = make_model(train_bias=False, **fields)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        output = model.train()(make_batches(1)[0][0])
        assert not output.requires_grad
        assert not any(delta.is_selected for delta in deltas_of(model).values())


def test_random_units_have_no_scoring_to_wait_for():
    model = make_model(score="random", schedule="once", score_steps=0, seed=5)
    other = make_model(score="random", schedule="once", score_steps=0, seed=6)
    for each in (model, other):
        train(each, SGD(trainable(each), 0.1), make_batches(1))
    assert any(deltas_of(model)[name].index.tolist() != deltas_of(other)[name].index.tolist() for name in TARGETS)


def test_the_cheap_configuration_trains_half_of_a_lora(make_net):
    from peft import get_peft_model

    from peft_dps import DPSConfig

    model = get_peft_model(make_net(), DPSConfig.compact(units=2, target_modules=["layers.0", "layers.1"]))
    assert sum(parameter.numel() for parameter in trainable(model)) == 2 * (16 + 3)
