from __future__ import annotations

import pytest

from peft_dps.compare.data.corpora import _FILES
from peft_dps.compare.data.sentiment import sentiment_task
from peft_dps.compare.settings import Settings


@pytest.fixture
def corpora(tmp_path):
    """Four corpora of 60 made-up sentences, a third of them neutral."""
    for name, file in _FILES.items():
        rows = [f"{i}_1\t{(-2.0, 0.1, 2.0)[i % 3]}\t{name} number {i} of the {i * i} we made up" for i in range(60)]
        (tmp_path / file).write_text("\n".join(rows))
    return tmp_path


def test_classes_leave_the_neutral_out(corpora):
    task = sentiment_task(corpora, Settings(validation_size=5, test_size=30))
    assert (task.name, task.metrics, task.train.label_names) == ("sentiment", ("accuracy",), ("negative", "positive"))
    assert list(task.tests) == ["movie", "amazon", "nyt", "tweets"]
    assert task.sizes == {
        "train": 27,
        "validation": 5,
        "test/movie": 8,
        "test/amazon": 30,
        "test/nyt": 30,
        "test/tweets": 30,
    }
    parts = [set(part.texts) for part in (task.train, task.validation, task.tests["movie"])]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_the_regression_keeps_every_rating(corpora):
    task = sentiment_task(corpora, Settings(validation_size=6), regression=True)
    assert (task.name, task.metrics, task.is_regression) == ("sentiment-regression", ("pearson", "spearman"), True)
    assert task.sizes["test/amazon"] == 60
    assert set(task.train.labels) == {-2.0, 0.1, 2.0}
