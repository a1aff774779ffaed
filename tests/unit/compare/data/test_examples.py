"""Examples: grouped splits and stratified draws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from datasets import Value

from peft_dps.compare.data.examples import Examples, hold_out, subset, train_and_test


def many(size: int = 1000, group_size: int = 4, positive: int = 4) -> Examples:
    """One in `positive` examples is positive."""
    texts = tuple(f"text {i}" for i in range(size))
    labels = tuple(int((i * 7919) % positive == 0) for i in range(size))
    return Examples("some", texts, labels, tuple(f"g{i // group_size}" for i in range(size)), ("no", "yes"))


def test_splits_keep_groups_whole_and_lose_nothing() -> None:
    data = many(group_size=7)
    training, test = train_and_test(data)
    assert Counter(training.texts + test.texts) == Counter(data.texts)
    assert not set(training.groups) & set(test.groups)
    rows = dict(zip(data.texts, zip(data.labels, data.groups, strict=True), strict=True))
    for part in (training, test):
        assert [rows[text] for text in part.texts] == list(zip(part.labels, part.groups, strict=True))
    assert abs(len(test) - 200) <= 7


def test_a_split_depends_on_the_groups_alone() -> None:
    data = many()
    backwards = data.take(range(len(data))[::-1])
    assert set(train_and_test(backwards)[1].texts) == set(train_and_test(data)[1].texts)
    # Pinned: a report made on another machine or Python version must have used the same test set.
    assert train_and_test(many(40, 1))[1].texts[:4] == ("text 1", "text 16", "text 20", "text 23")


def test_parts_that_are_empty_or_lack_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="too few to split a fifth off"):
        train_and_test(many(100, 1, positive=100))
    plain = many(8, 8)
    with pytest.raises(ValueError, match="too few to split a fifth off"):
        train_and_test(Examples("some", plain.texts, tuple(map(float, plain.labels)), plain.groups))


def test_at_most_a_fifth_is_held_out_and_whole_groups_at_a_time(examples):
    grouped = replace(examples(), groups=tuple(str(i // 4) for i in range(60)))
    rest, held = hold_out(grouped, 500)
    assert len(held) == 12
    assert len(rest) == 48
    assert set(Counter(held.groups).values()) == {4}


def test_data_without_enough_examples_is_named(examples):
    with pytest.raises(ValueError, match="4 examples of 'here' in 4 groups are too few"):
        hold_out(examples(4), 10)


def test_classes_that_never_occur_are_not_missed(examples):
    given = replace(examples(), label_names=("down", "up", "never"))
    rest, _ = hold_out(given, 8)
    assert set(rest.labels) == {0, 1}
    training, test = train_and_test(given)
    assert set(training.labels) == set(test.labels) == {0, 1}


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


def test_subset_has_the_class_balance_of_the_whole() -> None:
    data = many()
    for size in (*range(4, 60), 200, 1000):
        drawn = subset(data, size)
        assert len(drawn) == size
        assert abs(sum(drawn.labels) - size / 4) <= 0.5  # rounded to the nearest
        assert len(set(drawn.texts)) == size


def test_smaller_subset_lies_in_larger_one() -> None:
    data = many(300, positive=3)
    larger: set[str] = set(data.texts)
    for size in range(299, 1, -1):
        smaller = set(subset(data, size, seed=5).texts)
        assert len(smaller) == size
        assert smaller < larger
        larger = smaller


def test_subset_depends_on_the_seed() -> None:
    assert subset(many(), 50, seed=1) == subset(many(), 50, seed=1)
    assert set(subset(many(), 50, seed=1).texts) != set(subset(many(), 50, seed=2).texts)


def test_rare_class_is_drawn_at_least_once() -> None:
    assert Counter(subset(many(500, positive=500), 2).labels) == {0: 1, 1: 1}


def test_regression_subset_is_plain() -> None:
    data = Examples("some", ("a", "b", "c"), (0.5, 1.5, 2.5), ("1", "2", "3"))
    assert len(subset(data, 1)) == 1
    assert subset(data, 3) == data


@pytest.mark.parametrize("size", [0, 1, 1001])
def test_subset_refuses_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"`size` must be in \[2, 1000\], got {size}\."):
        subset(many(), size)


def test_to_dataset_for_classes_pairs_and_regression() -> None:
    data = Examples("some", ("t0", "t1"), (0, 1), ("0", "1"), ("negative", "positive")).to_dataset()
    assert data.to_dict() == {"text": ["t0", "t1"], "label": [0, 1]}
    assert data.features["label"].names == ["negative", "positive"]
    paired = Examples("some", ("a",), (0.5,), ("1",), pairs=("b",)).to_dataset()
    assert paired.to_dict() == {"text": ["a"], "label": [0.5], "text_pair": ["b"]}
    assert paired.features["label"] == Value("float32")
