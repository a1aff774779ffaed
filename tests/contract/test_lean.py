"""`lean=True` on every kind of layer: another source of scores, and nothing else is different."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from peft_dps.tuner.adapter import find_controllers

pytestmark = [pytest.mark.device, pytest.mark.parametrize("variant", ["dense", "mix"])]


def test_training_with_scores_that_do_not_decay_is_that_of_exact_scores(case, variant):
    """With beta2 near 1 the second moment of a stage is its sum of squares: the same entries are selected."""
    models, masks = [], []
    for lean in (False, True):
        torch.manual_seed(0)
        model = case.model(variant=variant, lean=lean, stage_steps=3)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.99999)
        )
        case.train(model, steps=4, optimizer=optimizer)
        models.append(model)
        masks.append([weight.frozen.mask.keep for weight in find_controllers(model)["default"].weights])
    agreeing = [(one == two).float().mean() for one, two in zip(*masks, strict=True)]
    assert min(agreeing) > 0.98
    status = models[1].dps_status()
    assert status.engaged
    assert not status.frozen_moved


def test_a_lean_training_is_saved_and_loaded_as_any_other(case, variant, tmp_path):
    model = case.model(variant=variant, lean=True)
    case.train(model, steps=5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].lean
    model.eval()
    loaded.eval()
    assert torch.equal(case.output(loaded), case.output(model))
    case.train(loaded, steps=5)
    assert loaded.dps_status().engaged
