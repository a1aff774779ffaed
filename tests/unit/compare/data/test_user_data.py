from __future__ import annotations

import pytest

from peft_dps.compare.data.examples import DataError
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.settings import Settings


@pytest.fixture
def make(data_files, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(data_files / "prepared"))

    def make(**fields):
        values = {"source": str(data_files / "train.csv"), "text_columns": ["sentence"], "label_column": "mood"}
        return OwnData(**{**values, **fields})

    return make


def test_a_fifth_is_tested_on_where_there_is_no_test(make, data_files):
    task = make(others={"far": str(data_files / "elsewhere.csv")}).task(Settings())
    assert task.name == "train"
    assert task.sizes == {"train": 39, "validation": 9, "test/test": 12, "test/far": 60}
    assert not set(task.train.texts) & set(task.tests["test"].texts)


def test_the_test_data_given_is_tested_on(make, data_files):
    task = make(test=str(data_files / "elsewhere.csv"), name="mood", metrics=["accuracy", "f1"]).task(Settings())
    assert task.name == "mood"
    assert task.sizes == {"train": 48, "validation": 12, "test/elsewhere": 60}
    assert task.metrics == ("accuracy", "f1")


def test_a_test_that_lacks_a_class_keeps_the_numbers_of_the_others(make, data_files):
    lines = (data_files / "train.csv").read_text().splitlines()
    three = [lines[0], *lines[1:], *(f"the film {i},level" for i in range(20))]
    (data_files / "three.csv").write_text("\n".join(three))
    task = make(source=str(data_files / "three.csv"), test=str(data_files / "elsewhere.csv")).task(Settings())
    assert task.train.label_names == ("down", "level", "up")
    assert set(task.tests["elsewhere"].labels) == {0, 2}


def test_a_test_may_have_one_class_alone(make, data_files):
    (data_files / "far.csv").write_text("sentence,mood\na film,up\na plot,up")
    task = make(others={"far": str(data_files / "far.csv")}).task(Settings())
    assert set(task.tests["far"].labels) == {1}


def test_a_further_domain_does_not_replace_the_test(make, data_files):
    with pytest.raises(ValueError, match="`other` must not have the name of the test data, got 'test'"):
        make(others={"test": str(data_files / "elsewhere.csv")}).task(Settings())


def test_labels_that_do_not_fit_are_named(make, data_files):
    (data_files / "other.csv").write_text("sentence,mood\na film,up\na plot,sideways")
    with pytest.raises(DataError, match=r"'far' has the labels \['sideways'\].*\['down', 'up'\]"):
        make(others={"far": str(data_files / "other.csv")}).task(Settings())
    (data_files / "numbers.csv").write_text("sentence,mood\na film,0.5\na plot,0.25")
    with pytest.raises(DataError, match="'far' has numbers as labels"):
        make(others={"far": str(data_files / "numbers.csv")}).task(Settings())


def test_a_column_that_is_not_there_is_named(make):
    with pytest.raises(ValueError, match="`label_column` must name columns of the data, got 'feeling'"):
        make(label_column="feeling").task(Settings())
