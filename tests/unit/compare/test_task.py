from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from peft_dps.compare.corpora import DataError
from peft_dps.compare.plan import Settings
from peft_dps.compare.task import build_task, hold_out, train_and_test


@pytest.fixture
def task(examples):
    tests = {"here": examples(30), "there": examples(12, "there")}
    return build_task("mine", examples(), tests, Settings(validation_size=8, test_size=20))


def test_validation_is_held_out_of_the_training_data(task, examples):
    assert task.sizes == {"train": 52, "validation": 8, "test/here": 20, "test/there": 12}
    assert not set(task.train.groups) & set(task.validation.groups)
    assert set(task.train.texts) | set(task.validation.texts) == set(examples().texts)


def test_at_most_a_fifth_is_held_out_and_whole_groups_at_a_time(examples):
    grouped = replace(examples(), groups=tuple(str(i // 4) for i in range(60)))
    rest, held = hold_out(grouped, 500)
    assert len(held) == 12
    assert len(rest) == 48
    assert set(Counter(held.groups).values()) == {4}


def test_draws_differ_by_seed_and_leave_validation_and_tests_alone(task):
    first, second = task.draw(20, 0), task.draw(20, 1)
    assert first.train != second.train
    assert (first.validation, first.tests) == (second.validation, second.tests)
    assert Counter(first.train.labels) == {0: 10, 1: 10}
    assert task.draw(None, 3) is task
    assert first.fingerprint() == task.draw(20, 0).fingerprint() != second.fingerprint()


@pytest.mark.parametrize("part", ["validation", "tests"])
def test_the_fingerprint_covers_every_split(task, examples, part):
    other = {"validation": examples(3), "tests": {**task.tests, "there": examples(11)}}
    assert replace(task, **{part: other[part]}).fingerprint() != task.fingerprint()


def test_too_many_training_examples_are_named(task):
    with pytest.raises(ValueError, match=r"`train_size` 53 does not fit task 'mine', which has 52 .* beside 8"):
        task.draw(53, 0)


def test_data_without_enough_examples_is_named(examples):
    with pytest.raises(ValueError, match="4 examples of 'here' in 4 groups are too few"):
        hold_out(examples(4), 10)


def test_classes_that_never_occur_are_not_missed(examples):
    given = replace(examples(), label_names=("down", "up", "never"))
    rest, _ = hold_out(given, 8)
    assert set(rest.labels) == {0, 1}
    training, test = train_and_test(given)
    assert set(training.labels) == set(test.labels) == {0, 1}


def test_tests_with_other_labels_are_named(examples):
    other = replace(examples(12), label_names=("no", "yes"))
    with pytest.raises(DataError, match=r"'there' has the labels \('no', 'yes'\)"):
        build_task("mine", examples(), {"here": examples(), "there": other}, Settings())


def test_metrics_follow_from_the_labels(examples):
    assert build_task("a", examples(), {"a": examples()}, Settings()).metrics == ("accuracy",)
    numbers = examples(regression=True)
    task = build_task("a", numbers, {"a": numbers}, Settings(), ["spearman"])
    assert (task.metrics, task.is_regression, task.num_labels) == (("spearman",), True, 1)
    assert build_task("a", numbers, {"a": numbers}, Settings()).metrics == ("pearson",)


def test_a_fifth_is_split_off_for_testing(examples):
    train, test = train_and_test(examples())
    assert len(test) == 12
    assert len(train) == 48
    assert not set(train.groups) & set(test.groups)


def test_twenty_examples_are_enough_to_train_and_test(examples):
    train, test = train_and_test(examples(20))
    assert len(train) + len(test) == 20
    assert set(train.labels) == set(test.labels) == {0, 1}
    with pytest.raises(ValueError, match=r"The 4 examples of 'here' are too few .* test data of its own"):
        train_and_test(examples(4))
