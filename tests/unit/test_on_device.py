"""What DPS computes on a device has the bits that the CPU computes, where nothing is said to the contrary."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_dps.masking.compact.linear import add_columns, add_rows
from peft_dps.masking.frozen_bits import (
    frozen_checksum,
    hold_frozen,
    restore_from_snapshot_,
    restore_frozen_,
    zero_frozen_,
)
from peft_dps.masking.mask import Mask
from peft_dps.masking.noise import ColumnNoise
from peft_dps.selection.evidence import AbsoluteGradients, SquaredGradients, are_finite
from peft_dps.selection.granularity import GRANULARITIES
from peft_dps.selection.topk import SortableScores, select, select_within
from peft_dps.selection.unit_sums import UnitSums
from peft_dps.tensors.layout import Units, out_in
from tests.device import DEVICE

pytestmark = pytest.mark.device
CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "empty": lambda tensor: tensor[:0],
}


def scores_with_ties(shape, dtype):
    return torch.randn(shape).square().mul_(64).round_().div_(64).to(dtype)


def selected(scores, density):
    """The best of scores that may lie on several devices."""
    count = int(sum(each.numel() for each in scores) * density)
    return select([SortableScores.of(each) for each in scores], count)


@DTYPES
@pytest.mark.parametrize("shape", [(7, 5), (300, 1000), (3, 0)], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.7, 1.0])
def test_the_same_entries_are_selected(dtype, shape, density):
    for scores in (scores_with_ties(shape, dtype), torch.zeros(shape, dtype=dtype), torch.rand(shape).to(dtype)):
        (mask,) = selected([scores.to(DEVICE)], density)
        assert mask.device == DEVICE
        assert torch.equal(mask.cpu(), selected([scores], density)[0])


@DTYPES
def test_the_same_entries_are_selected_over_several_weights(dtype):
    scores = [scores_with_ties((50, 70), dtype), scores_with_ties((9,), dtype), scores_with_ties((8, 1000), dtype)]
    places = [DEVICE, CPU, DEVICE]
    masks = selected([each.to(place) for each, place in zip(scores, places, strict=True)], 0.3)
    for mask, expected, place in zip(masks, selected(scores, 0.3), places, strict=True):
        assert mask.device == place
        assert torch.equal(mask.cpu(), expected)


def test_the_same_units_are_selected():
    weights = [scores_with_ties((40, 30), torch.float32), scores_with_ties((8, 3, 5), torch.float32)]
    layouts = [Units((40, 30), 1, (1,)), Units((8, 3, 5), 2, (3, 1))]
    found = []
    for device in (CPU, DEVICE):
        sums = [units.sums(weight.to(device)) for units, weight in zip(layouts, weights, strict=True)]
        scores = [SortableScores.of(each.square()) for each in sums]
        chosen = select_within(scores, [units.size for units in layouts], 500)
        assert {each.device for each in chosen} == {device}
        found.append([units.expand(each) for units, each in zip(layouts, chosen, strict=True)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs.cpu())


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_at_work(dtype, layout):
    weight = LAYOUTS[layout](torch.randn(6, 5, 4, 4).to(dtype))
    gradient, changed = torch.randn_like(weight), torch.randn_like(weight)
    if weight.numel():
        weight[0, 0, 0, 0], gradient[0, 0, 0, 1], changed[0, 0, 0, 0] = float("nan"), float("inf"), -0.0
    chosen = torch.rand(weight.shape) < 0.4
    found = []
    for device in (CPU, DEVICE):
        mask = Mask.of(chosen.to(device, copy=True))
        here = [copy.deepcopy(tensor).to(device) for tensor in (weight, gradient, changed, changed)]
        zero_frozen_(here[1], mask)
        held = hold_frozen(here[0], mask)
        restore_frozen_(here[2], mask, held)
        restore_from_snapshot_(here[3], mask, here[0])
        checksum = frozen_checksum(here[0], mask.keep)
        some = mask.rows(torch.tensor([[1, 3], [0, 1]], device=device)).keep if weight.numel() else mask.keep
        found.append([*here, held, checksum, some, mask.state()])
    for ours, theirs in zip(*found, strict=True):
        assert ours.stride() == theirs.stride()
        views = (each.cpu().contiguous().view(-1).view(torch.uint8) for each in (ours, theirs))
        assert torch.equal(*views)


@pytest.mark.parametrize("entries", [0, 1, 8, 1001, 1 << 20])
@pytest.mark.parametrize("in_bits", [True, False])
def test_masks_that_are_saved(entries, in_bits):
    chosen = torch.rand(entries, 1 if entries % 8 else 8) < 0.3
    mask = Mask.of(chosen.to(DEVICE, copy=True), in_bits=in_bits)
    state = mask.state()
    assert torch.equal(state.cpu(), Mask.of(chosen.clone()).state())
    assert torch.equal(Mask.load(state, chosen.shape).keep.cpu().bool(), chosen)
    assert torch.equal(mask.keep.cpu().bool(), chosen)


def test_noise():
    noise, again = (ColumnNoise(0.6, 3) for _ in range(2))
    for step in (1, 2, 10**6):
        rows = (each.draw(step, [40, 17, 1000], device) for each, device in ((noise, DEVICE), (again, CPU)))
        for ours, theirs in zip(*rows, strict=True):
            assert ours.device == DEVICE
            assert torch.equal(ours.cpu(), theirs)


@DTYPES
@pytest.mark.parametrize("evidence", [SquaredGradients, AbsoluteGradients])
@pytest.mark.parametrize("adds_up_in", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_gradients(dtype, evidence, adds_up_in):
    """A GPU rounds the product and the sum once, as a CPU may or may not."""
    gradients = [torch.randn(300, 40).to(dtype), torch.randn(7).to(dtype)]
    sums = []
    for device in (CPU, DEVICE):
        totals = [torch.zeros(each.shape, dtype=adds_up_in, device=device) for each in gradients]
        for _ in range(3):
            evidence().add_(totals, [each.to(device) for each in gradients], scale=8.0)
        sums.append(totals)
    for ours, theirs in zip(*sums, strict=True):
        tolerance = 4 * torch.finfo(adds_up_in).eps
        torch.testing.assert_close(ours, theirs.to(CPU), rtol=tolerance, atol=0)


@DTYPES
def test_gradients_that_are_not_finite_are_found_on_any_device(dtype):
    gradients = [torch.ones(3, dtype=dtype), torch.ones(5, dtype=dtype, device=DEVICE)]
    assert are_finite(gradients)
    for index in range(2):
        for value in ("nan", "inf"):
            bad = [each.clone() for each in gradients]
            bad[index][1] = float(value)
            assert not are_finite(bad)


@pytest.mark.parametrize("granularity", ["row", "column", "submatrix"])
def test_scores_of_units_do_not_differ_from_run_to_run(granularity):
    """Masks are made from them: nothing may be added up in the order in which it happens to come."""
    units, gradient = GRANULARITIES.find(granularity)().units(out_in((768, 512))), torch.randn(768, 512).to(DEVICE)
    found = []
    for _ in range(4):
        sums = UnitSums(units, 2)
        for _ in range(2):
            sums.add(gradient)
        found.append((sums.pending, units.sums(gradient.square())))
    assert all(torch.equal(*pair) for run in found[1:] for pair in zip(run, found[0], strict=True))


@pytest.mark.parametrize("add", [add_columns, add_rows])
def test_layers_of_compact_storage_do_not_differ_from_run_to_run(add):
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 384).to(DEVICE, torch.bfloat16)
    index = torch.randperm(256)[:40].sort().values.int().to(DEVICE)
    delta = torch.randn((384, 40) if add is add_columns else (40, 256)).to(DEVICE).requires_grad_()
    x, found = torch.randn(2, 64, 256).to(DEVICE, torch.bfloat16).requires_grad_(), []
    for _ in range(4):
        delta.grad = x.grad = None
        y = add(base, x, delta, index)
        y.square().sum().backward()
        found.append((y.detach(), delta.grad, x.grad))
    assert all(torch.equal(*pair) for run in found[1:] for pair in zip(run, found[0], strict=True))
