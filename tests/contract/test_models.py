"""Whole models, each with the head of its task: what is promised of one is promised of all."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_dps import DPSLayer, Stage
from tests.contract.zoo import ZOO, Whole

pytestmark = pytest.mark.device


@pytest.fixture(params=ZOO, ids=str)
def whole(request: pytest.FixtureRequest) -> Whole:
    return request.param


@pytest.fixture(params=[whole for whole in ZOO if whole.name != "ResNet"], ids=str)  # transformers' has none
def checkpointing(request: pytest.FixtureRequest) -> Whole:
    return request.param


@pytest.fixture(params=[whole for whole in ZOO if whole.generate], ids=str)
def generator(request: pytest.FixtureRequest) -> Whole:
    return request.param


def weights(model):
    return {
        name: module.dps_weight["default"].detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, DPSLayer)
    }


@pytest.mark.supports("Models", "trains, {variant}", row="whole")
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_both_stages_train(whole, variant):
    model = whole.model(variant=variant)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = whole.optimizer(model)
    losses = whole.train(model, 2, optimizer)
    before = weights(model)
    losses += whole.train(model, 2, optimizer)
    status = model.dps_status()
    assert (status.steps, status.stage, status.engaged, status.frozen_moved) == (4, Stage.SUBNETWORK, True, False)
    assert {layer.observed for layer in status.layers.values()} == {2}, "a targeted layer took no part in a step"
    for name, after in weights(model).items():
        moved = int((after != before[name]).sum())
        assert 0 < moved <= math.ceil(0.5 * after.numel()), name
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert losses[-1] < losses[0]


@pytest.mark.supports("Models", "disables to the bit", row="whole")
def test_disabled_adapters_leave_the_base_bit_for_bit(whole):
    expected = whole.output(whole.base())
    model = whole.model()
    whole.train(model, 3)
    trained = whole.output(model)
    with model.disable_adapter():
        assert torch.equal(whole.output(model), expected)
    assert not torch.allclose(trained, expected, atol=1e-4)
    assert torch.equal(whole.output(model), trained)


@pytest.mark.supports("Models", "saves and loads", row="whole")
def test_a_loaded_adapter_computes_the_same(whole, tmp_path):
    model = whole.model()
    whole.train(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(whole.base(), tmp_path).eval()
    assert torch.equal(whole.output(loaded), whole.output(model))


@pytest.mark.supports("Models", "merges", row="whole")
def test_the_merged_model_computes_the_same(whole):
    model = whole.model(variant="mix")
    whole.train(model, 3)
    expected = whole.output(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(whole.output(merged), expected, rtol=1e-5, atol=1e-6)
    assert type(merged) is type(whole.base())
    assert set(merged.state_dict()) == set(whole.base().state_dict())


@pytest.mark.supports("Models", "generates", row="generator")
def test_generation_with_and_without_cache_is_the_merged_model_s(generator):
    model = generator.model()
    generator.train(model, 3)
    options = {**generator.generate, "max_new_tokens": 6, "do_sample": False}
    logits = {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**options, **logits)
    uncached = model.generate(**options, **logits, use_cache=False)
    merged = model.merge_and_unload().generate(**options, **logits)
    assert len(merged.logits) == 6
    for output in (cached, uncached):
        assert torch.equal(output.sequences, merged.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(merged.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.supports("Models", "`train_remaining`", row="whole")
def test_the_paper_s_settings_train_every_parameter(whole):
    model = whole.model(frozen="gradient", train_remaining=True, modules_to_save=None)
    base = whole.base()
    shadowed = ("base_layer.", "original_module.")
    rest = {n for n, p in model.named_parameters() if not p.requires_grad and not any(part in n for part in shadowed)}
    own = {f"base_model.model.{name}" for name, _ in base.named_parameters(recurse=False)}
    assert rest == own  # a parameter of the outermost module itself, such as CLIP's temperature, cannot be reached
    whole.train(model, 3)
    expected = whole.output(model)
    torch.testing.assert_close(whole.output(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.supports("Models", "gradient checkpointing", row="checkpointing")
def test_gradient_checkpointing_trains_the_same(checkpointing):
    plain, recomputed = checkpointing.model(variant="mix"), checkpointing.model(variant="mix")
    base = recomputed.base_model.model
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # of transformers 5.23, and before
    next(getattr(base, name) for name in names if hasattr(base, name))({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in recomputed.modules())
    expected = checkpointing.train(plain, 3)
    assert checkpointing.train(recomputed, 3) == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(recomputed).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.refuses(
    "Models",
    "running statistics of batch norms in the base model",
    "training changes them, an adapter does not hold them: a warning asks for `modules_to_save` or `train_remaining`",
)
def test_running_statistics_that_no_adapter_holds_are_warned_of(caplog):
    resnet = next(whole for whole in ZOO if whole.name == "ResNet")
    with caplog.at_level(logging.WARNING, logger="peft_dps"):
        for covered in ({"modules_to_save": ["normalization"]}, {"train_remaining": True}, {"inference_mode": True}):
            resnet.model(**{"modules_to_save": None, **covered})
        assert not caplog.records
        resnet.model(modules_to_save=["classifier"])
    assert "running statistics of 9 norms (resnet.embedder.embedder.normalization, ...)" in caplog.text
    assert "Add these modules to `modules_to_save`" in caplog.text


def test_reading_the_weight_of_a_dense_adapter_computes_nothing():
    """T5 asks for the dtype of `wo.weight` in every forward."""
    whole = next(whole for whole in ZOO if whole.name == "T5")
    model = whole.model().train()
    layers = [module for name, module in model.named_modules() if name.endswith(".wo")]
    assert layers
    for layer in layers:
        assert layer.weight is layer.dps_weight["default"]


def test_every_kind_of_task_is_in_the_zoo():
    tasks = {whole.options.get("task_type") for whole in ZOO}
    assert tasks >= {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"}
    assert len({whole.name for whole in ZOO}) == len(ZOO)
    assert all(isinstance(whole.base(), nn.Module) for whole in ZOO)
