from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from peft_dps.compare.data.examples import DataError
from peft_dps.compare.data.task import build_task
from peft_dps.compare.settings import Settings


@pytest.fixture
def task(examples):
    tests = {"here": examples(30), "there": examples(12, "there")}
    return build_task("mine", examples(), tests, Settings(validation_size=8, test_size=20))


def test_validation_is_held_out_of_the_training_data(task, examples):
    assert task.sizes == {"train": 52, "validation": 8, "test/here": 20, "test/there": 12}
    assert not set(task.train.groups) & set(task.validation.groups)
    assert set(task.train.texts) | set(task.validation.texts) == set(examples().texts)


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
