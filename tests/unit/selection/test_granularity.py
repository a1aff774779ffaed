"""Units of every kind of layer, selected as slow loops would select them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from transformers.pytorch_utils import Conv1D

from peft_dps import DPSConfig
from peft_dps.errors import ConfigError, TargetError
from peft_dps.selection.granularity import GRANULARITIES, Block
from tests.compact import Tile
from tests.reference import ReferenceDense
from tests.unit.conftest import trainable

UNITS = ["row", "column", "submatrix", "tile", "tensor", "block"]
SCOPED = pytest.mark.parametrize(
    ("granularity", "scope"),
    [
        *((unit, scope) for unit in ("row", "column", "submatrix", "tile") for scope in ("tensor", "model")),
        ("tensor", "model"),
        ("block", "model"),
    ],
)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 6) / 2)
        self.is_transposed = False

    def forward(self, x):
        return torch.tanh(torch.einsum("bi,eoi->bo", x, self.weight))


class Net(nn.Module):
    """A layer of each kind, in two numbered blocks and outside of them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict({"conv": nn.Conv1d(4, 8, 3, padding=1, groups=2), "proj": Conv1D(6, 8)}),
                nn.ModuleDict({"experts": Experts(), "out": nn.Linear(4, 3)}),
            ]
        )

    def forward(self, x):
        x = torch.tanh(self.blocks[0]["conv"](self.words(x).transpose(1, 2))).mean(-1)
        x = self.blocks[1]["experts"](torch.tanh(self.blocks[0]["proj"](x)))
        return self.blocks[1]["out"](x)


MODULES = ["words", "blocks.0.conv", "blocks.0.proj", "blocks.1.out"]
# Per weight, in the order in which PEFT finds them: row and column of an entry, its tile of up to three rows and
# columns, the matrix that it is in, and its block.
PLACES = {
    "words": (lambda i: i[0], lambda i: i[1], lambda i: (i[0] // 3, i[1] // 2), lambda _: 0, "words"),
    "blocks.0.conv": (
        lambda i: i[0], lambda i: (i[0] // 4, i[1]), lambda i: i[0] // 2, lambda i: i[0] // 4, "blocks.0",
    ),
    "blocks.0.proj": (lambda i: i[1], lambda i: i[0], lambda i: (i[0] // 2, i[1] // 3), lambda _: 0, "blocks.0"),
    "blocks.1.out": (lambda i: i[0], lambda i: i[1], lambda i: i[1] // 2, lambda _: 0, "blocks.1"),
    "blocks.1.experts.weight": (
        lambda i: (i[0], i[1]), lambda i: (i[0], i[2]), lambda i: (i[0], i[1] // 2, i[2] // 3), lambda i: i[0],
        "blocks.1",
    ),
}  # fmt: skip


def names_of(granularity: str):
    """Per weight, a function that names the unit of an entry, so that names sort as units are numbered."""
    made = []
    for name, (row, column, tile, matrix, block) in PLACES.items():
        whole = {"tensor": lambda _: 0, "block": lambda _: 0}
        unit = {"row": row, "column": column, "tile": tile, "submatrix": matrix, **whole}[granularity]
        owner = block if granularity == "block" else name
        made.append(lambda index, unit=unit, owner=owner: (owner, unit(index)))
    return made


def train(granularity, scope, *, reduction="mean", optimizer=AdamW, density=0.4):
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    config = DPSConfig(
        target_modules=MODULES, target_parameters=["experts.weight"], train_bias=False, density=density,
        stage_steps=3, granularity=granularity, scope=scope, reduction=reduction,
    )  # fmt: skip
    model = get_peft_model(ours, config)
    weights = [theirs.get_parameter(name if name.endswith("weight") else f"{name}.weight") for name in PLACES]
    theirs.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    reference = ReferenceDense(
        weights, density=density, stage_steps=3, scope=scope, units=names_of(granularity), reduction=reduction
    )
    first, second = optimizer(trainable(model), lr=1e-2), optimizer(weights, lr=1e-2)
    for step in range(8):
        x, y = torch.randint(9, (8, 5)), torch.randint(3, (8,))
        for net, each in ((model, first), (theirs, second)):
            each.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        first.step()
        reference.before_step()
        second.step()
        reference.after_step()
        yield step, model, reference, weights


@SCOPED
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_training_follows_the_reference(granularity, scope, optimizer):
    for step, model, reference, weights in train(granularity, scope, optimizer=optimizer):
        tracked = {each.name: each for each in next(iter(controllers(model))).weights}
        assert list(tracked) == list(PLACES)
        for index, each in enumerate(tracked.values()):
            assert (each.frozen is not None) == (not reference.accumulating)
            if each.frozen is not None:
                assert torch.equal(each.frozen.mask.keep.bool(), reference.masks[index]), (step, each.name)
            torch.testing.assert_close(each.weight, weights[index].detach(), rtol=0, atol=1e-6)
        assert not model.dps_status().frozen_moved


def controllers(model):
    return {controller for module in model.modules() for controller in getattr(module, "dps_controllers", {}).values()}


@SCOPED
def test_the_sum_of_scores_favours_large_units(granularity, scope):
    for _, model, reference, _ in train(granularity, scope, reduction="sum"):
        if reference.accumulating:
            continue
        for index, each in enumerate(next(iter(controllers(model))).weights):
            assert torch.equal(each.frozen.mask.keep.bool(), reference.masks[index])


@SCOPED
def test_the_status_counts_entries(granularity, scope):
    for _, model, reference, _ in train(granularity, scope):
        if not reference.accumulating:
            counts = [int(mask.sum()) for mask in reference.masks]
            assert [layer.selected for layer in model.dps_status().layers.values()] == counts
            assert model.dps_status().selected == sum(counts)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("embeddings", "embeddings"),
        ("7", "7"),
        ("h.12", "h.12"),
    ],
)
def test_a_block_is_a_numbered_layer_of_the_model(path, block):
    assert Block().owner(path) == block


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_whole_weights_are_chosen_over_the_model(granularity):
    assert DPSConfig(granularity=granularity).scope == "model"
    with pytest.raises(ConfigError, match=rf"`granularity='{granularity}'` selects whole weights.*`scope='model'`"):
        DPSConfig(granularity=granularity, scope="tensor")


@pytest.mark.parametrize("granularity", ["row", "column", "submatrix"])
def test_parameters_without_a_known_axis_have_no_rows(granularity):
    net = nn.Module()
    net.layer = nn.Module()
    net.layer.weight = nn.Parameter(torch.randn(3, 4))
    net.forward = lambda x: x @ net.layer.weight
    config = DPSConfig(target_modules=[], target_parameters=["layer.weight"], granularity=granularity)
    with pytest.raises(TargetError, match=r"nothing tells which axis holds inputs.*granularity='entry'"):
        get_peft_model(net, config)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match="`reduction` must be 'mean' or 'sum', got 'max'"):
        DPSConfig(reduction="max")


def test_every_granularity_is_tested_here():
    assert GRANULARITIES.find("tile") is Tile
    assert {*UNITS, "entry"} == set(GRANULARITIES)
