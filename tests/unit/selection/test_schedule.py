from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dps.errors import ConfigError, ScheduleError
from peft_dps.selection.schedule import Position, Stage, StageSchedule

lengths = st.integers(1, 10_000)
steps = st.integers(1, 10**9)


@given(lengths, steps)
def test_a_step_accumulates_iff_the_number_of_finished_stages_is_even(length, step):
    expected = Stage.ACCUMULATE if ((step - 1) // length) % 2 == 0 else Stage.SUBNETWORK
    assert StageSchedule(length).at(step).stage is expected


@given(lengths, steps)
def test_position_gives_the_step_back(length, step):
    position = StageSchedule(length).at(step)
    stages_done = 2 * (position.cycle - 1) + (position.stage is Stage.SUBNETWORK)
    assert position.cycle >= 1
    assert 1 <= position.step_in_stage <= length
    assert stages_done * length + position.step_in_stage == step


def test_two_cycles_of_two_steps_are_written_out():
    accumulate, subnetwork = Stage.ACCUMULATE, Stage.SUBNETWORK
    assert [StageSchedule(2).at(step) for step in range(1, 9)] == [
        Position(1, accumulate, 1),
        Position(1, accumulate, 2),
        Position(1, subnetwork, 1),
        Position(1, subnetwork, 2),
        Position(2, accumulate, 1),
        Position(2, accumulate, 2),
        Position(2, subnetwork, 1),
        Position(2, subnetwork, 2),
    ]


def test_stages_of_one_step_alternate():
    stages = [StageSchedule(1).at(step).stage for step in range(1, 5)]
    assert stages == [Stage.ACCUMULATE, Stage.SUBNETWORK] * 2


def test_stages_are_their_names():
    assert [stage.value for stage in Stage] == ["accumulate", "subnetwork"]


@pytest.mark.parametrize("step", [0, -1])
def test_a_step_before_the_first_is_refused(step):
    with pytest.raises(ConfigError, match=rf"`step` is counted from 1, got {step}"):
        StageSchedule(3).at(step)


@pytest.mark.parametrize("length", [0, -4])
def test_a_stage_without_steps_is_refused(length):
    with pytest.raises(ConfigError, match=rf"`stage_steps` must be at least 1 step, got {length}"):
        StageSchedule(length)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        StageSchedule(3).stage_steps = 4


@pytest.mark.parametrize("total_steps", [None, 8, 1000])
def test_an_int_is_a_number_of_steps(total_steps):
    assert StageSchedule.resolve(7, total_steps) == StageSchedule(7)


@given(
    st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    st.integers(2, 10**7),
)
def test_a_fraction_is_rounded_down_to_at_least_one_step(fraction, total_steps):
    expected = max(1, int(total_steps * fraction))
    if expected >= total_steps:  # the largest fractions round up to the whole
        return
    assert StageSchedule.resolve(fraction, total_steps) == StageSchedule(expected)


@pytest.mark.parametrize(
    ("fraction", "total_steps", "expected"),
    [(0.05, 1000, 50), (0.05, 119, 5), (0.05, 19, 1), (0.05, 2, 1), (0.5, 3, 1), (0.99, 100, 99)],
)
def test_fractions_worked_out_by_hand(fraction, total_steps, expected):
    assert StageSchedule.resolve(fraction, total_steps).stage_steps == expected


def test_a_fraction_of_an_unknown_total_is_refused_by_field_and_value():
    with pytest.raises(ScheduleError, match=r"`stage_steps=0.05` is a fraction of all training steps"):
        StageSchedule.resolve(0.05, None)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("total_steps", [None, 100])
def test_a_fraction_out_of_range_is_refused_by_field_and_value(fraction, total_steps):
    with pytest.raises(ConfigError, match=rf"`stage_steps` as a fraction .* in \(0, 1\), got {fraction}"):
        StageSchedule.resolve(fraction, total_steps)


@pytest.mark.parametrize(("length", "total_steps"), [(10, 10), (11, 10), (1, 1), (0.5, 1)])
def test_a_stage_that_fills_the_training_is_refused_by_field_and_values(length, total_steps):
    in_steps = length if isinstance(length, int) else 1
    message = rf"`stage_steps` is {in_steps} of only {total_steps} training steps.*smaller `stage_steps`"
    with pytest.raises(ConfigError, match=message):
        StageSchedule.resolve(length, total_steps)


def test_a_stage_one_step_shorter_than_the_training_is_enough():
    schedule = StageSchedule.resolve(9, 10)
    assert schedule.at(10) == Position(cycle=1, stage=Stage.SUBNETWORK, step_in_stage=1)


def test_an_int_out_of_range_is_refused_also_with_an_unknown_total():
    with pytest.raises(ConfigError, match="`stage_steps` must be at least 1 step, got 0"):
        StageSchedule.resolve(0, None)
