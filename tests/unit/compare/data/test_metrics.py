from __future__ import annotations

import numpy as np
import pytest

from peft_dps.compare.data.metrics import METRICS, check_metrics, measure

TRUTH = np.array([1, 1, 1, 0, 0, 1])
GUESS = np.array([1, 0, 1, 0, 1, 1])  # 3 true positives, 1 false one, 1 false negative, 1 true negative


def test_metrics_of_classes_by_hand():
    found = measure(["accuracy", "f1", "matthews", "macro_f1"], GUESS, TRUTH)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["matthews"] == pytest.approx((3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5)
    assert found["macro_f1"] == pytest.approx((0.75 + 0.5) / 2)


def test_metrics_of_numbers_by_hand():
    truth, guess = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    found = measure(["pearson", "spearman"], guess, truth)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1])


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("guess", [[1.0, 1.0, 1.0], [np.nan, 1.0, 2.0]])
def test_predictions_without_a_correlation_are_worth_nothing(name, guess):
    assert METRICS[name](np.array(guess), np.array([1.0, 2.0, 3.0])) == 0.0


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_constant_classes_are_worth_nothing(name):
    assert METRICS[name](np.zeros(6, dtype=int), TRUTH) == 0.0


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (["bleu"], 2, "must be among accuracy, .* got 'bleu'"),
        (["f1"], 3, "3 classes, got 'f1'"),
        (["pearson"], 2, "2 classes, got 'pearson'"),
        (["accuracy"], 0, "numbers, got 'accuracy'"),
        ([], 2, "at least one metric"),
    ],
)
def test_metrics_that_do_not_fit_are_named(names, classes, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(names, classes)
