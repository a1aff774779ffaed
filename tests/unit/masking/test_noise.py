from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from peft_dps.errors import StateError
from peft_dps.masking.effective_weight import NoisyWeight
from peft_dps.masking.mixed_weight import MixedColumns, MixedEntries
from peft_dps.masking.noise import NOISES, ColumnNoise, Mixconnect, Mixout, Noise, Participation
from peft_dps.tensors.layout import in_out, out_in
from peft_dps.tensors.saved_state import SavedState

CPU = torch.device("cpu")
ROW = [0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0]  # of seed 0, the first weight, step 1 and density 0.5


def a_weight(layout, first=0, rows=None):
    """What noise looks at of a weight, whole or some rows of it."""
    sharding = None if rows is None else SimpleNamespace(first=first, rows=rows)
    return SimpleNamespace(layout=layout, sharding=sharding)


def participation(counts, decay=False):
    noise = Participation(decay)
    noise.count = torch.tensor(counts, dtype=torch.float32)
    return noise


# --- the bits ---


def test_a_bit_depends_on_the_seed_the_weight_the_step_and_the_column_alone():
    first, other = ColumnNoise(0.7, seed=3), ColumnNoise(0.7, seed=3)
    expected = first.draw(5, [40, 30], CPU)
    torch.manual_seed(99)
    other.draw(1, [40, 30], CPU)
    other.draw(5, [7], CPU)  # other weights in between
    again = other.draw(5, [40, 30, 20], CPU)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=False))
    assert [row.dtype for row in again] == [torch.bool] * 3
    assert [len(row) for row in again] == [40, 30, 20]
    assert not torch.equal(expected[0], first.draw(6, [40, 30], CPU)[0])
    assert not torch.equal(expected[0], ColumnNoise(0.7, seed=4).draw(5, [40, 30], CPU)[0])
    assert not torch.equal(expected[0][:30], expected[1])


def test_bits_are_the_same_on_every_machine_and_in_every_version():
    """They are worked out by integer arithmetic: a change here changes every training with noise."""
    (row,) = ColumnNoise(0.5, seed=0).draw(1, [16], CPU)
    assert row.int().tolist() == ROW


@pytest.mark.parametrize("density", [0.1, 0.7, 0.999])
def test_columns_take_part_as_often_as_the_density_says(density):
    row = torch.cat(ColumnNoise(density, seed=1).draw(3, [50_000, 50_000], CPU))
    assert row.double().mean().item() == pytest.approx(density, abs=5 * (density * (1 - density) / 100_000) ** 0.5)


def test_weights_without_columns_get_no_bits():
    rows = ColumnNoise(0.5).draw(1, [3, 0, 2], CPU)
    assert [len(row) for row in rows] == [3, 0, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))])  # noqa: S301
def test_copies_draw_the_same(copied):
    noise = ColumnNoise(0.5, seed=2)
    expected = noise.draw(1, [9], CPU)[0]
    assert torch.equal(copied(noise).draw(1, [9], CPU)[0], expected)


def test_noise_is_found_by_name_and_none_substitutes_nothing():
    assert NOISES.find("columns") is ColumnNoise
    assert NOISES.find("none") is Noise
    assert not Noise.substitutes
    assert Noise().draw(1, [3, 4], CPU) == (None, None)
    assert Noise().noisy(None) is None
    assert Noise().amplified(None) is None
    assert not Noise().begin().state().tensors


def test_the_mean_of_what_a_forward_computes_with_is_the_weight():
    weight, base = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    draws, density = 4000, 0.7
    noise, layout = ColumnNoise(density), out_in((5, 40))
    total = torch.zeros_like(weight)
    for step in range(draws):
        columns = layout.columns.spread(noise.draw(step, [40], CPU)[0].double())
        total += NoisyWeight(base, columns, density).of(weight)
    error = (weight - base).abs() * ((1 - density) / density / draws) ** 0.5
    assert ((total / draws - weight).abs() <= 4.5 * error).all()


# --- Mixout and mixconnect ---


def mixed(kind, weight, base, step=1):
    """What a forward computes with, and b in the weight's shape."""
    layout, noise = out_in(tuple(weight.shape)), kind(0.6, seed=2)
    (drawn,) = noise.draw(step, [noise.units(layout).count], CPU)
    held = SimpleNamespace(
        noise=SimpleNamespace(drawn=drawn), layout=layout, whole_base=lambda: base, whole_dtype=lambda: weight
    )
    if kind is Mixout:
        return noise.noisy(held), layout.columns.expand(drawn)
    return noise.noisy(held), drawn.at(torch.arange(weight.numel())).view(weight.shape)


@pytest.mark.parametrize("kind", [Mixout, Mixconnect])
@pytest.mark.parametrize("shape", [(5, 8), (300, 700), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixed_weights_and_their_gradients_are_the_formula(kind, shape, dtype):
    weight, base = torch.randn(shape, dtype=dtype), torch.randn(shape).to(dtype)
    effective, b = mixed(kind, weight, base)
    expected = torch.where(b, torch.lerp(base, weight, 1 / 0.6), base)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-12
    torch.testing.assert_close(effective.of(weight), expected, rtol=tolerance, atol=tolerance)
    into = torch.empty(shape, dtype=dtype)
    assert effective.of(weight, into) is into
    assert torch.equal(into, effective.of(weight))
    gradient = torch.randn(shape).to(dtype)
    made = effective.gradient_(gradient.clone())
    assert torch.equal(made, torch.where(b, gradient / 0.6, torch.zeros_like(gradient)))
    assert effective.active_columns() is None


@pytest.mark.parametrize("kind", [Mixout, Mixconnect])
def test_rows_of_a_mixed_weight_are_those_of_the_whole(kind):
    weight, base = torch.randn(20, 6), torch.randn(20, 6)
    effective, _ = mixed(kind, weight, base)
    rows = torch.tensor([[3, 3, 19], [0, 7, 3]])
    assert torch.equal(effective.at(rows).of(weight[rows]), effective.of(weight)[rows])
    assert torch.equal(effective.at(rows).gradient_(weight[rows]), effective.gradient_(weight.clone())[rows])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", [Mixout, Mixconnect])
def test_a_gradient_of_what_takes_no_part_is_zero_whatever_it_was(kind, value):
    weight = torch.randn(6, 5)
    effective, b = mixed(kind, weight, weight)
    assert torch.equal(effective.gradient_(torch.full((6, 5), value)).eq(0), ~b)
    turned = torch.ones(5, 6).t()  # of another layout than row by row
    assert torch.equal(effective.gradient_(turned), b / 0.6)


def test_bits_of_entries_are_the_same_wherever_they_are_made_and_independent():
    drawn = Mixconnect(0.7, seed=1).draw(3, [90_000, 90_000], CPU)
    one, two = (each.at(torch.arange(90_000)).double() for each in drawn)
    assert torch.equal(drawn[0].at(torch.arange(500, 700)).double(), one[500:700])
    later = Mixconnect(0.7, seed=1).draw(4, [90_000], CPU)[0].at(torch.arange(90_000)).double()
    other = Mixconnect(0.7, seed=2).draw(3, [90_000], CPU)[0].at(torch.arange(90_000)).double()
    for bits in (one, two, later, other):
        assert bits.mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 90_000) ** 0.5)
    pairs = torch.corrcoef(torch.stack([one, two, later, other, one.roll(1), one.roll(300)])).fill_diagonal_(0)
    assert pairs.abs().max() < 5 * 90_000**-0.5


def test_kinds_of_noise_are_found_by_name():
    assert (NOISES.find("mixout"), NOISES.find("mixconnect")) == (Mixout, Mixconnect)
    assert isinstance(mixed(Mixout, torch.ones(2, 3), torch.ones(2, 3))[0], MixedColumns)
    assert isinstance(mixed(Mixconnect, torch.ones(2, 3), torch.ones(2, 3))[0], MixedEntries)
    assert Mixout().units(out_in((2, 3))).count == 3
    assert Mixconnect().units(out_in((2, 3))).count == 6


# --- participation ---


def test_participation_counts_the_columns_that_took_part_and_all_where_there_was_no_noise():
    noise = ColumnNoise(0.5).begin()
    noise.count_step(3, CPU, noisy=True)  # none were drawn
    noise.drawn = torch.tensor([True, False, False])
    noise.count_step(3, CPU, noisy=True)
    noise.count_step(3, CPU, noisy=False)
    assert noise.count.tolist() == [3.0, 2.0, 2.0]
    assert noise.count.dtype is torch.float32


def test_evidence_is_divided_by_how_often_its_column_took_part():
    evidence = torch.tensor([[6.0, 6.0, 6.0], [3.0, 3.0, 3.0]])
    noise = participation([3, 1, 0])
    noise.relax_(evidence, a_weight(out_in((2, 3))), 7)
    assert evidence.tolist() == [[2.0, 6.0, 6.0], [1.0, 3.0, 3.0]]


def test_columns_of_a_transposed_weight_are_its_rows():
    evidence = torch.full((3, 2), 6.0)
    participation([3, 1, 2]).relax_(evidence, a_weight(in_out((3, 2))), 7)
    assert evidence.tolist() == [[2.0, 2.0], [6.0, 6.0], [3.0, 3.0]]


def test_groups_of_a_convolution_have_columns_of_their_own():
    evidence = torch.full((4, 2, 1), 12.0)
    participation([1, 2, 3, 4]).relax_(evidence, a_weight(out_in((4, 2, 1), groups=2)), 7)
    assert evidence.flatten(1).tolist() == [[12.0, 6.0], [12.0, 6.0], [4.0, 3.0], [4.0, 3.0]]


@pytest.mark.parametrize("layout", [out_in((4, 2, 1), groups=2), in_out((4, 2)), out_in((4, 2))], ids=str)
@pytest.mark.parametrize("decay", [False, True])
def test_rows_of_a_cut_weight_are_relaxed_as_those_of_the_whole(layout, decay):
    counts = list(range(layout.columns.count))
    whole = torch.rand(layout.shape)
    parts = [whole[:3].clone(), whole[3:].clone(), whole[4:].clone()]
    participation(counts, decay).relax_(whole, a_weight(layout), 5)
    for first, part in zip((0, 3, 4), parts, strict=True):
        participation(counts, decay).relax_(part, a_weight(layout, first, len(part)), 5)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("decay", "stage_steps", "decays"),
    [(None, 49, False), (None, 50, True), (True, 3, True), (False, 80, False)],
)
def test_decay_starts_at_fifty_steps_unless_told_otherwise(decay, stage_steps, decays):
    evidence = torch.ones(1, 3)
    participation([0, 1, 2], decay).relax_(evidence, a_weight(out_in((1, 3))), stage_steps)
    times = torch.tensor([[0.0, 1.0, 2.0]])
    expected = 1 / times.clamp(min=1)
    assert torch.equal(evidence, expected * torch.exp(-times / stage_steps) if decays else expected)


def test_evidence_is_relaxed_once_also_where_a_selection_is_repeated():
    evidence, noise = torch.ones(1, 2), participation([2, 4])
    for _ in range(2):
        noise.relax_(evidence, a_weight(out_in((1, 2))), 7)
    assert evidence.tolist() == [[0.5, 0.25]]


def test_participation_that_was_saved_comes_back():
    state = participation([0, 2, 5]).state()
    saved = SavedState("'0'", {}, state.whole)
    loaded = ColumnNoise(0.5).load(saved, out_in((2, 3)), CPU)
    saved.finish()
    assert loaded.count.tolist() == [0.0, 2.0, 5.0]
    assert loaded.count is not state.whole["participation"]
    assert ColumnNoise(0.5).load(SavedState("'0'", {}, {}), out_in((2, 3)), CPU).count is None


@pytest.mark.parametrize("bad", [[-1.0, 0.0, 0.0], [float("nan"), 0.0, 0.0], [1.0, 2.0], [float("inf"), 0.0, 0.0]])
def test_participation_that_makes_no_sense_is_refused(bad):
    saved = SavedState("'0'", {}, {"participation": torch.tensor(bad)})
    with pytest.raises(StateError, match="of '0' is damaged: its tensor 'participation'"):
        ColumnNoise(0.5).load(saved, out_in((2, 3)), CPU)
