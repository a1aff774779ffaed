from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dps.errors import ConfigError, ScheduleError
from peft_dps.selection.phase import ACCUMULATE, FULL, REWOUND, SUBNETWORK, Position, Stage
from peft_dps.selection.schedule import SCHEDULES, Cycle, Every, Full, Once, ScheduleSettings, TwoPhase

lengths = st.integers(1, 10_000)
steps = st.integers(1, 10**9)


@given(lengths, steps)
def test_a_step_accumulates_iff_the_number_of_finished_stages_is_even(length, step):
    expected = Stage.ACCUMULATE if ((step - 1) // length) % 2 == 0 else Stage.SUBNETWORK
    assert Cycle(length).at(step).phase.stage is expected


@given(lengths, steps)
def test_position_gives_the_step_back(length, step):
    position = Cycle(length).at(step)
    stages_done = 2 * (position.cycle - 1) + (position.phase.stage is Stage.SUBNETWORK)
    assert position.cycle >= 1
    assert position.number == stages_done
    assert 1 <= position.step <= position.length == length
    assert stages_done * length + position.step == step
    assert position.is_last is (step % length == 0)


def test_two_cycles_of_two_steps_are_written_out():
    assert [Cycle(2).at(step) for step in range(1, 9)] == [
        Position(0, ACCUMULATE, 1, 2, 1),
        Position(0, ACCUMULATE, 2, 2, 1),
        Position(1, SUBNETWORK, 1, 2, 1),
        Position(1, SUBNETWORK, 2, 2, 1),
        Position(2, ACCUMULATE, 1, 2, 2),
        Position(2, ACCUMULATE, 2, 2, 2),
        Position(3, SUBNETWORK, 1, 2, 2),
        Position(3, SUBNETWORK, 2, 2, 2),
    ]


def test_stages_of_one_step_alternate():
    stages = [Cycle(1).at(step).phase.stage for step in range(1, 5)]
    assert stages == [Stage.ACCUMULATE, Stage.SUBNETWORK] * 2


def test_stages_are_their_names():
    assert [stage.value for stage in Stage] == ["accumulate", "subnetwork", "full"]


def test_evidence_is_gathered_in_one_phase_and_a_mask_holds_in_the_other():
    assert (ACCUMULATE.gathers, ACCUMULATE.masked) == (True, False)
    assert (SUBNETWORK.gathers, SUBNETWORK.masked) == (False, True)


@pytest.mark.parametrize("schedule", [Cycle(3), Once(3)])
@pytest.mark.parametrize("step", [0, -1])
def test_a_step_before_the_first_is_refused(schedule, step):
    with pytest.raises(ConfigError, match=rf"`step` is counted from 1, got {step}"):
        schedule.at(step)


@pytest.mark.parametrize("length", [0, -4])
def test_a_stage_without_steps_is_refused(length):
    with pytest.raises(ConfigError, match=rf"`stage_steps` as a number of steps must be at least 1, got {length}"):
        Cycle(length)


@pytest.mark.parametrize("length", [True, "3", [3]])
def test_a_length_that_is_no_number_is_refused(length):
    with pytest.raises(ConfigError, match=r"`stage_steps` must be an int \(steps\) or a float \(fraction\), got"):
        Cycle(length)


@pytest.mark.parametrize(("schedule", "field"), [(Cycle(3), "stage_steps"), (Once(3), "score_steps")])
def test_a_schedule_cannot_be_changed(schedule, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 4)


@pytest.mark.parametrize("total_steps", [None, 8, 1000])
def test_an_int_is_a_number_of_steps(total_steps):
    assert Cycle(7).resolve(total_steps) == Cycle(7)


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), st.integers(20, 10**7))
def test_a_fraction_leaves_ten_steps_at_least_to_both_stages(fraction, total_steps):
    steps = Cycle(fraction).resolve(total_steps).stage_steps
    assert 10 <= steps <= total_steps - 10
    assert steps == int(total_steps * fraction) or steps in (10, total_steps - 10)
    assert TwoPhase(fraction).resolve(total_steps) == TwoPhase(steps)


@pytest.mark.parametrize(
    ("fraction", "total_steps", "expected"),
    [(0.05, 1000, 50), (0.05, 219, 10), (None, 1000, 50), (0.25, 40, 10), (0.9, 100, 90)],
)
def test_fractions_worked_out_by_hand_stand_for_what_they_say(fraction, total_steps, expected):
    for schedule in (Cycle(fraction), TwoPhase(fraction), Every(fraction, 4)):
        assert schedule.resolve(total_steps).stage_steps == expected
        assert schedule.warning(total_steps) is None


@pytest.mark.parametrize(
    ("schedule", "total_steps", "expected", "said"),
    [
        (Cycle(0.05), 75, 10, "`stage_steps=0.05` of 75 training steps is 3. A stage has 10 steps, the fewest"),
        (Cycle(None), 21, 10, "`stage_steps=0.05` of 21 training steps is 1. A stage has 10 steps, the fewest"),
        (TwoPhase(0.01), 20, 10, "`stage_steps=0.01` of 20 training steps is 0. A stage has 10 steps"),
        (Cycle(0.99), 100, 90, "`stage_steps=0.99` of 100 training steps is 99. A stage has 90 steps, so that 10 are"),
        (Every(0.05, 0), 75, 10, "`stage_steps=0.05` of 75 training steps is 3. A stage has 10 steps"),
        (Every(0.05, 8), 75, 16, "`stage_steps=0.05` of 75 training steps is 3. A stage has 16 steps"),
    ],
)
def test_a_fraction_that_is_not_taken_as_it_is_says_so_and_names_the_remedy(schedule, total_steps, expected, said):
    assert schedule.resolve(total_steps).stage_steps == expected
    assert said in schedule.warning(total_steps)
    assert "give `stage_steps` as an int" in schedule.warning(total_steps)


@pytest.mark.parametrize(
    ("schedule", "total_steps", "needed"),
    [(Cycle(0.5), 19, 20), (TwoPhase(0.25), 8, 20), (Every(0.5, 0), 9, 10), (Every(None, 6), 11, 12)],
)
def test_a_training_too_short_for_a_fraction_is_refused_with_remedies(schedule, total_steps, needed):
    asked = schedule.length.fraction
    message = rf"`stage_steps={asked}` is a fraction of only {total_steps} training steps.* needs {needed}.*as an int"
    with pytest.raises(ConfigError, match=message):
        schedule.resolve(total_steps)
    assert schedule.resolve(needed).stage_steps == schedule.length.shortest


@pytest.mark.parametrize("schedule", [Cycle(0.05), Every(0.05, 2), TwoPhase(0.05), TwoPhase(None)])
def test_a_fraction_of_an_unknown_total_is_refused_by_field_and_value(schedule):
    with pytest.raises(ScheduleError, match=r"`stage_steps=0.05` is a fraction of all training steps"):
        schedule.resolve(None)


@pytest.mark.parametrize(("schedule", "expected"), [(Cycle(None), 10), (Every(None, 4), 10), (Every(None, 8), 16)])
def test_stages_that_come_again_have_a_length_also_if_nobody_says_any(schedule, expected):
    assert schedule.resolve(None).stage_steps == expected
    assert f"is unknown: a stage has {expected} steps. Give `stage_steps` as an int" in schedule.warning(None)


@pytest.mark.parametrize("total_steps", [None, 8, 1000])
def test_nothing_is_said_of_a_number_of_steps(total_steps):
    assert not Cycle(3).is_relative
    for schedule in (Cycle(3), Every(3, 2), TwoPhase(3), Full()):
        assert schedule.warning(total_steps) is None


def test_scoring_that_takes_most_of_the_training_says_so():
    assert Once(8).warning(16) is Once(8).warning(None) is Once(0).warning(2) is None
    said = Once(8).warning(12)
    assert "`score_steps=8` of 12 training steps leaves 4 to train what is selected" in said
    assert "`model.dps_score(batches)`" in said


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.0, 1.5, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused_by_field_and_value(fraction):
    with pytest.raises(ConfigError, match=rf"`stage_steps` as a fraction .* in \(0, 1\), got {fraction}"):
        Cycle(fraction)


@pytest.mark.parametrize(("length", "total_steps"), [(10, 10), (11, 10), (1, 1)])
def test_a_stage_that_fills_the_training_is_refused_by_field_and_values(length, total_steps):
    message = rf"`stage_steps` is {length} of only {total_steps} training steps.*smaller `stage_steps`"
    with pytest.raises(ConfigError, match=message):
        Cycle(length).resolve(total_steps)


def test_a_stage_one_step_shorter_than_the_training_is_enough():
    schedule = Cycle(9).resolve(10)
    assert schedule.at(10) == Position(1, SUBNETWORK, 1, 9, 1)


@given(st.integers(0, 10_000), steps)
def test_evidence_is_gathered_once_and_the_mask_stays(score_steps, step):
    position = Once(score_steps).at(step)
    assert position.cycle == 1
    if step <= score_steps:
        assert position == Position(0, ACCUMULATE, step, score_steps)
    else:
        assert position == Position(1, SUBNETWORK, step - score_steps, None)
        assert not position.is_last


@pytest.mark.parametrize("score_steps", [-1, 2.0, True, None])
def test_a_number_of_steps_of_scoring_is_checked(score_steps):
    with pytest.raises(ConfigError, match="`score_steps` must be an integer of at least 0"):
        Once(score_steps)


def test_scoring_that_fills_the_training_is_refused():
    assert Once(9).resolve(10) == Once(9).resolve(None) == Once(9)
    with pytest.raises(ConfigError, match=r"`score_steps` is 10 of only 10 training steps.*smaller `score_steps`"):
        Once(10).resolve(10)


@given(lengths, steps)
def test_selecting_every_few_steps_without_scoring_begins_with_a_mask(length, step):
    position = Every(length, 0).at(step)
    assert position.phase == SUBNETWORK
    assert (position.number - 1) // 2 * length + position.step == step
    assert 1 <= position.step <= position.length == length
    assert position.is_last is (step % length == 0)


def test_selecting_every_few_steps_needs_steps_to_select_for():
    assert not Every(1, 0).gathers
    assert Every(2, 1).gathers
    with pytest.raises(ConfigError, match="`stage_steps` as a number of steps must be at least 2, got 1"):
        Every(1, 1)
    with pytest.raises(ConfigError, match="`stage_steps` as a number of steps must be at least 1, got 0"):
        Every(0, 0)
    with pytest.raises(ConfigError, match="`score_steps` must be an integer of at least 0, got -1"):
        Every(5, -1)


@given(lengths, steps)
def test_two_phases_follow_each_other_and_the_second_rewinds(length, step):
    position = TwoPhase(length).at(step)
    if step <= length:
        assert position == Position(0, ACCUMULATE, step, length)
    else:
        assert position == Position(1, REWOUND, step - length, None)
    assert position.phase.rewinds is (step > length)


def test_the_first_of_two_phases_leaves_steps_to_the_second():
    assert TwoPhase(3).resolve(None) == TwoPhase(3)
    with pytest.raises(ConfigError, match=r"`stage_steps` is 8 of only 8 training steps"):
        TwoPhase(8).resolve(8)


@given(steps)
def test_a_full_training_is_one_phase(step):
    assert Full().at(step) == Position(0, FULL, step, None)
    assert (FULL.gathers, FULL.masked, FULL.rewinds) == (False, False, False)
    assert not Full().selects


@pytest.mark.parametrize("schedule", [Cycle(3), Once(4), TwoPhase(5)])
def test_lengths_that_were_saved_come_back(schedule):
    other = type(schedule)(1)
    assert other.load(schedule.state()) == schedule
    assert Full().load(Full().state()) == Full()


def test_schedules_are_found_by_name():
    settings = ScheduleSettings(stage_steps=0.25, score_steps=6)
    assert SCHEDULES.find("cycle")(settings) == Cycle(0.25)
    assert SCHEDULES.find("once")(settings) == Once(6)
    assert SCHEDULES.find("every")(settings) == Every(0.25, 6)
    assert SCHEDULES.find("two-phase")(settings) == TwoPhase(0.25)
    assert SCHEDULES.find("full")(settings) == Full()
