from __future__ import annotations

import dataclasses
import json
import logging
import math

import pytest

from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import append, merge, read
from peft_dps.compare.runs.run import Candidate, Evaluation, Run, Selection, Timing, from_json, to_json
from peft_dps.compare.settings import Settings

EARLIER = '{"record":"run","plan":{"method":"full","learning_rate":1,"task":"a","seed":0,"model":"b","settings":{}},'
EARLIER += '"evaluations":[{"step":1,"seconds":2.0,"loss":0.5,"score":0.5}]}'


def plan(**fields):
    return Plan(**{"method": "full", "learning_rate": 1e-4, "task": "cola", "seed": 0, "model": "tiny", **fields})


def complete_run(**fields):
    values = {
        "plan": plan(options={"density": 0.3}, settings=Settings(epochs=1)),
        "title": "DPS Dense",
        "metrics": ["accuracy", "f1"],
        "scores": {"near": {"accuracy": 0.8, "f1": 0.6}, "far": {"accuracy": 0.5, "f1": 0.4}},
        "validation": {"accuracy": 0.7, "f1": 0.5},
        "candidates": [Candidate(1e-4, [0], 0.6, chosen=True), Candidate(1e-3, [0], math.nan)],
        "losses": [0.7, math.inf, math.nan],
        "evaluations": [Evaluation(1, math.nan, 0.4)],
        "selections": [Selection(1, 3, 4), Selection(2, 7, 8, [0.5, 0.4, 0.6], 0.2)],
        "fractions": {"a": 0.3, "b": 0.1},
        "selected": 7,
    }
    return Run(**{**values, **fields})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "runs.jsonl"


def test_a_run_comes_back_as_it_was():
    run = complete_run()
    again = from_json(to_json(run))
    assert isinstance(again, Run)
    assert math.isnan(again.losses[1])  # null stands for every number that is not finite
    assert math.isnan(again.candidates[1].score)
    assert math.isnan(again.evaluations[0].loss)
    parts = ("plan", "scores", "validation", "selections", "fractions", "selected", "frozen_moved", "metrics")
    assert [getattr(again, part) for part in parts] == [getattr(run, part) for part in parts]
    assert to_json(again) == to_json(run)


def test_the_line_is_strict_json():
    def refuse(name):
        raise AssertionError(name)

    content = json.loads(to_json(complete_run()), parse_constant=refuse)
    assert content["record"] == "run"
    assert content["selections"] == [[1, 3, 4, [], None], [2, 7, 8, [0.5, 0.4, 0.6], 0.2]]
    assert "status" not in content  # what is as by default is left out


def test_scores_are_means_of_the_metrics():
    run = complete_run()
    assert run.score() == pytest.approx(0.7)
    assert run.score("far") == pytest.approx(0.45)
    assert run.validation_score == pytest.approx(0.6)
    failed = Run(plan(), error="RuntimeError: out of memory")
    assert failed.failed
    assert math.isnan(failed.score())
    assert math.isnan(failed.validation_score)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Plan)])
def test_every_field_of_the_plan_is_in_the_identity(name):
    other = {
        "options": {"density": 0.5},
        "phase": "tune",
        "settings": Settings(epochs=2),
        "train_size": 5,
        "seed": 1,
        "learning_rate": 2e-4,
        "protocol": 99,
        "metrics": ("f1",),
    }
    changed = dataclasses.replace(plan(), **{name: other.get(name, "other")})
    assert changed.key != plan().key
    assert plan().key == plan().key


def test_records_are_read_back_in_order(path):
    first, second = complete_run(), complete_run(plan=plan(seed=1, phase="tune"))
    timing = Timing("tiny", "cola", 16, 12, {"full": [0.1], "lora": [0.2]})
    for record in (first, timing, second):
        append(record, path)
    results = read(path)
    assert list(results.runs) == [first.plan.key, second.plan.key]
    assert results.timings == [timing]
    assert results.reported == [results.runs[first.plan.key]]
    assert results.damaged == []


def test_a_missing_file_is_empty(path):
    assert read(path).runs == {}


def test_a_line_cut_in_the_middle_loses_itself_alone(path, caplog):
    for seed in range(3):
        append(complete_run(plan=plan(seed=seed)), path)
    whole = path.read_bytes()
    third = len(whole) - len(whole.splitlines()[2]) - 1
    for length in (third + 1, third + 40, len(whole) - 2):
        path.write_bytes(whole[:length])
        with caplog.at_level(logging.WARNING):
            assert [run.plan.seed for run in read(path).runs.values()] == [0, 1]
        assert "line 3 is no record" in caplog.text
        append(complete_run(plan=plan(seed=7)), path)
        results = read(path)
        assert [run.plan.seed for run in results.runs.values()] == [0, 1, 7]
        assert results.damaged == [3]


def test_a_whole_line_without_its_end_is_kept(path):
    append(complete_run(), path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append(complete_run(plan=plan(seed=1)), path)
    assert [run.plan.seed for run in read(path).runs.values()] == [0, 1]


def test_records_that_do_not_know_a_later_field_are_the_same_runs():
    line = json.loads(to_json(complete_run()))
    del line["plan"]["metrics"]
    assert from_json(json.dumps(line)).plan.key == complete_run().plan.key


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        '{"record": "run"}',
        '{"record": "run", "plan": {}}',
        '{"record": "run", "plan": null}',
        EARLIER,
        "\xff",
    ],
)
def test_lines_that_are_no_records_are_named(line, path):
    append(complete_run(), path)
    with path.open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert read(path).damaged == [2]


def test_a_failed_run_gives_way_to_a_later_one_and_a_finished_run_does_not(path):
    failed, finished = Run(plan(), error="OSError: no"), complete_run(plan=plan())
    for record in (failed, finished, failed):
        append(record, path)
    (run,) = read(path).runs.values()
    assert not run.failed


def test_what_a_later_version_adds_is_left_out():
    content = json.loads(to_json(complete_run()))
    content["news"] = content["plan"]["news"] = 1
    content["selections"][0].append("news")
    assert from_json(json.dumps(content)).plan == complete_run().plan


def test_of_a_run_in_several_files_one_that_finished_counts(tmp_path):
    failed, finished, again = complete_run(error="OSError: no"), complete_run(), complete_run(title="again")
    other = complete_run(plan=plan(seed=1))
    timing = Timing("tiny", "cola", 16, 32, {"full": [1.0]})
    for name, records in {"a": [failed, other], "b": [finished, timing], "c": [again]}.items():
        for record in records:
            append(record, tmp_path / name)
    whole = merge([read(tmp_path / name) for name in "abc"])
    assert [(run.plan.seed, run.error, run.title) for run in whole.runs.values()] == [
        (0, "", "DPS Dense"),
        (1, "", "DPS Dense"),
    ]
    assert whole.timings == [timing]
