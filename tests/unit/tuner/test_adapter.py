"""What `model.dps_score` is given by mistake is named, with what it takes instead."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSConfig
from peft_dps.errors import ConfigError
from tests.unit.conftest import Net

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


class Model(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {"logits": logits, **({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})}


@pytest.fixture
def model():
    return get_peft_model(Model(), DPSConfig.compact(units=2, score_steps=0, target_modules=["layers.0"]))


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "`batches` holds no batch to score, got an empty list"),
        (iter(()), None, "`batches` holds no batch to score, got an empty tuple_iterator"),
        ({"x": X, "labels": LABELS}, None, r"batches to go through, .* got dict. For a single batch .*\[batch\]"),
        (None, None, "must be batches to go through, such as a list, got NoneType"),
        ("train", None, "must be batches to go through, such as a list, got str"),
        ([(X, LABELS)], None, r"`batches` must hold dicts, .* got a tuple. Or give `loss=`"),
        ([{"x": X}], None, r"returned a dict without a loss for a batch of \['x'\]. Put `labels` into `batches`"),
        ([X], lambda model, x: None, "`loss` must return the loss of a batch, .* got a NoneType"),
        ([X], lambda model, x: model(x)["logits"], r"`loss` must .* got a tensor of shape \[4, 3\], with a grad"),
        ([X], lambda model, x: x.sum(), r"`loss` must return .* got a tensor of shape \[\], without a gradient"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named(model, batches, loss, message):
    with pytest.raises(ConfigError, match=message) as told:
        model.dps_score(batches, loss)
    assert "(base_layer)" not in str(told.value)
    assert model.dps_status().selected is None
    model.dps_score([{"x": X, "labels": LABELS}])  # and nothing is in the way of what can be
    assert model.dps_status().selected == 2 * 16
