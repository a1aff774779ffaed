"""Compact adapters that have units already, that are frozen by hand, and whose training cannot select any."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.optim import SGD, Adagrad, AdamW
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_dps import DPSConfig, dps_adapter, recipes
from peft_dps.errors import AdapterFileError, ConfigError, EngineError
from tests.compact import TARGETS, deltas_of, loss_of, make_base, make_batches, make_model, train, trainable
from tests.unit.conftest import Net

ONCE = {"schedule": "once", "train_bias": False}
KINDS = [("column", "tensor"), ("row", "model"), ("entry", "tensor"), ("tensor", "model"), ("block", "model")]


def indices_of(model) -> dict[str, list[int]]:
    return {name: delta.index.tolist() for name, delta in deltas_of(model).items()}


def own_tensors(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "dps_" in name}


def saved_after(tmp_path, batches, **fields) -> None:
    """Save an adapter that has units, and has been trained where steps are scored."""
    model = make_model(**{**ONCE, **fields})
    if fields["score_steps"] == 0:
        model.base_model.dps_score(batches, loss_of)
    else:
        train(model, AdamW(trainable(model), 1e-2), batches)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("score_steps", [0, 3])
@pytest.mark.parametrize(("granularity", "scope"), KINDS)
def test_a_loaded_adapter_trains_the_units_that_it_has(tmp_path, granularity, scope, score_steps):
    batches = make_batches(5)
    saved_after(tmp_path, batches, granularity=granularity, scope=scope, score_steps=score_steps)
    model = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).train()
    before, values = indices_of(model), own_tensors(model)
    assert not any(index == [-1] for index in before.values())
    train(model, AdamW(trainable(model), 1e-2), make_batches(1, seed=2))
    assert indices_of(model) == before
    assert all(delta.kept is None for delta in deltas_of(model).values())
    assert any(not torch.equal(value, values[name]) for name, value in own_tensors(model).items())
    status = model.base_model.dps_status()
    assert (status.steps, status.stage.value, status.engaged) == (1, "subnetwork", True)


def test_loading_into_a_model_and_a_second_training_keep_units_too(tmp_path):
    batches = make_batches(5)
    saved_after(tmp_path, batches, score_steps=3)
    model = make_model(**ONCE, score_steps=3)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.set_adapter("other")
    before = {name: delta.index.tolist() for name, delta in deltas_of(model, "other").items()}
    for _ in range(2):
        model.base_model.set_dps_total_steps(3)  # no more than would be scored in
        train(model, AdamW(trainable(model), 1e-2), make_batches(3, seed=2))
    assert {name: delta.index.tolist() for name, delta in deltas_of(model, "other").items()} == before


def test_scoring_by_hand_selects_anew_all_the_same(tmp_path):
    saved_after(tmp_path, make_batches(2), score_steps=0)
    model = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    before, other = indices_of(model), make_model(**ONCE, score_steps=0)
    for each in (model, other):
        each.base_model.dps_score(make_batches(3, seed=5), loss_of)
    chosen = [{name: set(index) for name, index in indices_of(each).items()} for each in (model, other)]
    assert chosen[0] == chosen[1] != {name: set(index) for name, index in before.items()}


def test_a_schedule_that_selects_again_scores_anew(tmp_path):
    fields = {"schedule": "every", "stage_steps": 4, "score_steps": 2}
    saved_after(tmp_path, make_batches(5), **fields)
    model = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).train()
    train(model, AdamW(trainable(model), 1e-2), make_batches(1, seed=2))
    assert model.base_model.dps_status().stage.value == "accumulate"


def test_a_continued_training_resumes_to_the_bit(tmp_path):
    batches = make_batches(6, seed=3)
    saved_after(tmp_path / "first", make_batches(5), score_steps=3)
    whole = PeftModel.from_pretrained(make_base(), tmp_path / "first", is_trainable=True).train()
    optimizer = AdamW(trainable(whole), 1e-2)
    train(whole, optimizer, batches[:2])
    whole.save_pretrained(tmp_path / "second")
    whole.base_model.save_dps_state(tmp_path / "state.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, batches[2:])
    resumed = PeftModel.from_pretrained(make_base(), tmp_path / "second", is_trainable=True).train()
    resumed.base_model.load_dps_state(tmp_path / "state.safetensors")
    again = AdamW(trainable(resumed), 1e-2)
    again.load_state_dict(state)
    train(resumed, again, batches[2:])
    assert resumed.base_model.dps_status() == whole.base_model.dps_status()
    expected = own_tensors(whole)
    assert all(torch.equal(value, expected[name]) for name, value in own_tensors(resumed).items())


# --- what is frozen by hand ---


@pytest.mark.parametrize("before_training", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_layers_that_are_frozen_by_hand_stay_frozen(scope, before_training):
    model = make_model(**ONCE, scope=scope, score_steps=0 if before_training else 2)
    frozen = deltas_of(model)["linear"].weight.requires_grad_(False)
    if before_training:
        model.base_model.dps_score(make_batches(2), loss_of)
    train(model, AdamW(trainable(model), 1e-2), make_batches(4))
    assert not frozen.requires_grad
    assert not frozen.any()
    if scope == "model":
        assert not deltas_of(model)["linear"].slots, "what is frozen takes no part of the budget"


def test_a_weight_without_units_for_a_while_is_trained_again():
    model = make_model(
        granularity="tensor", scope="model", density=0.3, schedule="every", score="random", score_steps=1,
        stage_steps=2, train_bias=False,
    )  # fmt: skip
    optimizer, seen = SGD(list(model.parameters()), 1e-2), {name: set() for name in TARGETS}
    for batch in make_batches(24):
        train(model, optimizer, [batch])
        for name, delta in deltas_of(model).items():
            seen[name].add((bool(delta.slots), delta.weight.requires_grad))
    assert any({(True, True), (False, True)} <= states for states in seen.values())
    assert all((True, False) not in states for states in seen.values())


# --- what selects nothing ---


def make_with_head(**fields):
    return make_model(target_modules=["linear"], modules_to_save=["head"], **ONCE, score_steps=2, **fields).eval()


def test_a_loop_in_evaluation_mode_is_refused_at_its_second_step():
    model = make_with_head()
    optimizer = SGD(trainable(model), 0.1)
    with pytest.raises(EngineError, match=r"2 optimizer steps were made in evaluation mode.*Call `model.train\(\)`"):
        train(model, optimizer, make_batches(3))
    train(model.train(), optimizer, make_batches(3))
    assert model.base_model.dps_status().engaged


def test_units_that_are_selected_train_in_evaluation_mode():
    model = make_with_head().train()
    optimizer = SGD(trainable(model), 0.1)
    train(model, optimizer, make_batches(3))
    train(model.eval(), optimizer, make_batches(3))
    assert model.base_model.dps_status().steps == 6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_saving_tells_why_nothing_was_selected(tmp_path, caplog, mode):
    model = make_with_head()
    model.save_pretrained(tmp_path)
    assert not caplog.records
    getattr(model, mode)()
    if mode == "eval":
        train(model, SGD(trainable(model), 0.1), make_batches(1))
    else:
        loss_of(model, make_batches(1)[0]).backward()
        with torch.no_grad():
            for parameter in trainable(model):
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        loss_of(model, make_batches(1)[0])
    model.save_pretrained(tmp_path)
    (record,) = caplog.records
    cause = {"eval": "made in evaluation mode", "train": "no optimizer step over its parameters"}[mode]
    assert "is saved without units" in record.getMessage()
    assert cause in record.getMessage()


# --- what it says ---


def test_the_status_tells_which_units_an_adapter_has(tmp_path):
    model = make_model(**ONCE, score_steps=0)
    assert str(model.base_model.dps_status()).endswith("no optimizer step seen yet, 580 entries targeted")
    model.base_model.dps_score(make_batches(2), loss_of)
    scored = model.base_model.dps_status()
    assert f"no optimizer step seen yet, selected {scored.selected} of {scored.entries} entries" in str(scored)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).base_model.dps_status()
    assert (loaded.selected, str(loaded)) == (scored.selected, str(scored))


def test_a_forgotten_score_is_not_taken_for_nan():
    model = make_model(**ONCE, score_steps=0)
    with pytest.raises(
        ValueError, match=r"call `model.dps_score\(batches\)` before training, or set `score_steps`"
    ) as told:
        train(model, SGD(trainable(model), 0.1), make_batches(1))
    assert "NaN" not in str(told.value)


@pytest.mark.parametrize("storage", ["copy", "compact"])
def test_a_failed_scoring_leaves_nothing(storage):
    batches, fields = make_batches(3), {**ONCE, "score_steps": 0, "storage": storage, "granularity": "row"}
    models = [make_model(**fields) for _ in range(2)]
    with pytest.raises(ConfigError, match="`loss` must return"):
        models[0].base_model.dps_score([*batches[:2], None], lambda model, batch: batch and loss_of(model, batch))
    for model in models:
        model.base_model.dps_score(batches, loss_of)
        train(model, SGD(trainable(model), 0.1), batches[:1])
    ours, theirs = (model.base_model.dps_status() for model in models)
    assert str(ours) == str(theirs)
    assert_equal_tensors(*models)


def assert_equal_tensors(model, other) -> None:
    theirs = own_tensors(other)
    for name, tensor in own_tensors(model).items():
        assert torch.equal(tensor, theirs[name]), name


AGAIN = {"schedule": "every", "score": "random", "score_steps": 0, "stage_steps": 1, "train_bias": False}


@pytest.mark.parametrize("fields", [{"granularity": "block"}, {"scope": "model", "density": 0.05}])
def test_an_optimizer_made_in_the_middle_trains_what_is_selected_later(fields):
    model, batches = make_model(**AGAIN, **fields), make_batches(6)
    train(model, AdamW(trainable(model), 1e-2), batches[:2])
    optimizer = AdamW(trainable(model), 1e-2)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for number, batch in enumerate(batches, 3):
        train(model, optimizer, [batch])
        assert all(id(delta.weight) in held for delta in deltas_of(model).values())
        assert model.base_model.dps_status().steps == number


@pytest.mark.parametrize("fields", [{"scope": "model"}, {"units": 2}])
def test_a_plain_state_dict_holds_all_units(fields):
    model, other = (make_model(**AGAIN, **fields) for _ in range(2))
    train(model, AdamW(trainable(model), 1e-2), make_batches(3))
    other.load_state_dict(model.state_dict())
    assert any(delta.kept is not None for delta in deltas_of(other).values())
    with torch.no_grad():
        tokens = make_batches(1)[0][0]
        assert torch.equal(model.eval()(tokens), other.eval()(tokens))


def test_a_layer_frozen_by_hand_is_in_the_way_of_no_save(tmp_path):
    model = make_model(**AGAIN, units=2)
    deltas_of(model)["linear"].weight.requires_grad_(False)
    train(model, AdamW(trainable(model), 1e-2), make_batches(3))
    model.base_model.save_dps_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_gradients_that_were_thrown_away_are_not_scored(scope):
    models = [make_model(**ONCE, score_steps=1, scope=scope) for _ in range(2)]
    (first, second), optimizers = make_batches(2), [AdamW(trainable(model), 1e-2) for model in models]
    (1e6 * loss_of(models[0], first)).backward()  # a spike that the loop skips
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [second, first])
    assert indices_of(models[0]) == indices_of(models[1])


def test_one_entry_has_state_of_its_own():
    fields = {**AGAIN, "granularity": "entry", "scope": "model", "density": 4 / 600}
    model, sizes = make_model(**fields), set()
    optimizer = AdamW(trainable(model), 1e-2)
    for batch in make_batches(40):
        train(model, optimizer, [batch])
        for delta in deltas_of(model).values():
            sizes.add(delta.slots)
            state = optimizer.state.get(delta.weight, {})
            assert all(value.shape == delta.weight.shape for value in state.values() if value.dim() > 0)
    assert {0, 1, 2} <= sizes


def test_state_from_before_the_selection_is_refused_where_it_has_no_place():
    model = make_model(**ONCE, score_steps=1, scope="model")
    with pytest.raises(EngineError, match="Adagrad has made 'sum' of the weight of 'linear' before its first step"):
        train(model, Adagrad(trainable(model), 0.1), make_batches(2))


def test_a_load_that_is_refused_leaves_the_units_as_they_were():
    model, other = (make_model(**AGAIN, units=2) for _ in range(2))
    train(model, AdamW(trainable(model), 1e-2), make_batches(3))
    state = get_peft_model_state_dict(model)
    del state[next(key for key in state if key.endswith(".dps_delta.index"))]
    train(other, AdamW(trainable(other), 1e-2), make_batches(1))
    before = {name: delta.kept is None for name, delta in deltas_of(other).items()}
    with pytest.raises(AdapterFileError, match="lacks 1 tensors"):
        set_peft_model_state_dict(other, state)
    assert {name: delta.kept is None for name, delta in deltas_of(other).items()} == before
    assert other.eval()(make_batches(1)[0][0]).isfinite().all()


def test_a_model_can_be_copied_after_noise_has_rewound_it():
    config = recipes.lt_sft(stage_steps=2, target_modules=["linear"], density=0.3, variant="mix")
    model = get_peft_model(make_base(), config)
    train(model, AdamW(trainable(model), 1e-2), make_batches(4))
    assert copy.deepcopy(model).base_model.dps_status().steps == 4


def test_a_layer_in_evaluation_mode_is_named(caplog):
    model = make_model(**ONCE, score_steps=1)
    model.base_model.model.linear.eval()
    train(model, AdamW(trainable(model), 1e-2), make_batches(2))
    assert "all scores of 'linear' are 0 at step 1" in caplog.text
    assert "evaluation mode" in caplog.text


def test_units_that_were_loaded_need_no_scores(tmp_path):
    saved_after(tmp_path, make_batches(2), score_steps=0)
    assert dps_adapter(make_model(**ONCE, score_steps=0)).awaits_scores
    assert not dps_adapter(PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)).awaits_scores


# --- the Trainer ---


class Pairs(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "x": torch.randn(12, generator=torch.Generator().manual_seed(index)),
            "labels": torch.tensor(index % 3),
        }


class Classifier(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_trainer(folder, *, loaded=None, metrics=(), **arguments) -> Trainer:
    torch.manual_seed(0)
    config = DPSConfig.compact(units=2, score_steps=4, target_modules=["layers.0"])
    base = Classifier()
    model = get_peft_model(base, config)
    if loaded is not None:
        model = PeftModel.from_pretrained(Classifier(), loaded, is_trainable=True)
    plain = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    plain |= {"disable_tqdm": True, "max_steps": 6, "save_strategy": "no", "output_dir": str(folder)}

    class WithMetrics(Trainer):
        def evaluate(self, *args, **kwargs):
            found = {"eval_loss": metrics[self.state.global_step // 2 - 1]}
            self.log(found)
            return found

    return WithMetrics(
        model=model, args=TrainingArguments(**{**plain, **arguments}), train_dataset=Pairs(), eval_dataset=Pairs()
    )


@pytest.mark.parametrize(("losses", "warns"), [((1.0, 2.0, 3.0), True), ((3.0, 2.0, 1.0), False)])
def test_the_best_checkpoint_may_be_from_before_the_selection(tmp_path, caplog, losses, warns):
    steps = {"eval_steps": 2, "save_steps": 2, "eval_strategy": "steps", "save_strategy": "steps"}
    trainer = make_trainer(tmp_path, metrics=losses, load_best_model_at_end=True, **steps)
    trainer.train()
    told = "`load_best_model_at_end` may be: but for biases" in caplog.text
    assert told is warns
    assert trainer.model.base_model.dps_status().steps == 6
    caplog.clear()
    trainer.model.save_pretrained(tmp_path / "saved")
    assert ("is saved without units" in caplog.text) is warns


def test_the_trainer_goes_on_with_a_loaded_adapter_however_few_its_steps(tmp_path):
    first = make_trainer(tmp_path)
    first.train()
    first.model.save_pretrained(tmp_path / "saved")
    trainer = make_trainer(tmp_path, loaded=tmp_path / "saved", max_steps=2)
    index = trainer.model.base_model.model.layers[0].dps_delta["default"].index.clone()
    trainer.train()
    assert torch.equal(trainer.model.base_model.model.layers[0].dps_delta["default"].index, index)
    assert trainer.model.base_model.dps_status().stage.value == "subnetwork"
