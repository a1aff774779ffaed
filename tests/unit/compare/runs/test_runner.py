"""The comparison as a whole, with a stand-in for the training: what is run, kept, repeated, and what an error does."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import pytest
from filelock import FileLock
from rich.console import Console

from peft_dps.compare.data.examples import DataError
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.runs import runner as module
from peft_dps.compare.runs.comparison import Comparison
from peft_dps.compare.runs.observer import Observer
from peft_dps.compare.runs.processes import Processes, WorkError
from peft_dps.compare.runs.results import read
from peft_dps.compare.runs.retention import measure_pretrained
from peft_dps.compare.runs.run import Evaluation, Retention, Run, Timing
from peft_dps.compare.runs.runner import compare
from peft_dps.compare.settings import Settings

RATES = (1e-4, 1e-3)


class Trainings:
    """Stands in for processes: remembers what was asked for, and fails as told."""

    def __init__(self):
        self.plans, self.tasks, self.timed, self.asked = [], [], [], 0
        self.fails = lambda plan: ""
        self.scores = {1e-4: 0.6, 1e-3: 0.7}

    def __call__(self, function, arguments, slot, report=None):
        if function is module.time_steps:
            self.timed.append([plan.variant for plan in arguments[0]])
            first, times = arguments[0][0], {plan.variant: [1.0] for plan in arguments[0]}
            return Timing(first.model, first.task, 16, 8, times, precision=first.settings.precision)
        if function is measure_pretrained:
            self.asked += 1
            return dict.fromkeys((probe.name for probe in arguments[0].probes), 0.8)
        plan, title, task, _, candidates = arguments
        self.plans.append(plan)
        self.tasks.append(task)
        report(1, 2, "")
        if error := self.fails(plan):
            raise error if isinstance(error, BaseException) else WorkError(error, "Traceback ...")
        score = {"accuracy": self.scores.get(plan.learning_rate, 0.5)}
        return Run(
            plan,
            title,
            metrics=["accuracy"],
            scores={"here": score} if plan.phase == "test" else {},
            validation=score,
            candidates=candidates,
            examples=task.sizes,
            retention=[Retention(name, "spearman", before, 0.6) for name, before in task.pretrained.items()],
            evaluations=[Evaluation(2, 0.5, score["accuracy"])],
        )


@pytest.fixture
def trainings(monkeypatch):
    stand_in = Trainings()
    monkeypatch.setattr(Processes, "run", stand_in)
    return stand_in


@pytest.fixture
def comparison(data_files, model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    return Comparison(
        output=tmp_path / "out" / "runs.jsonl",
        methods=[Choice("full", learning_rates=RATES), Choice("lora", learning_rates=RATES)],
        own=[OwnData(str(data_files / "train.csv"), text_columns=["sentence"], label_column="mood")],
        model=str(model_folder),
        train_sizes=[20],
        seeds=[0, 1],
        settings=Settings(validation_size=8),
    )


@pytest.fixture
def shown():
    return io.StringIO()


@pytest.fixture
def run(shown):
    def run(comparison):
        with Observer(Console(file=shown, width=200)) as observer:
            return compare(comparison, observer)

    return run


def test_rates_are_tried_then_every_seed_is_run_with_the_best(trainings, comparison, run):
    results = run(comparison)
    tried = [plan for plan in trainings.plans if plan.phase == "tune"]
    tested = [plan for plan in trainings.plans if plan.phase == "test"]
    assert trainings.plans == tried + tested
    assert [(plan.method, plan.learning_rate, plan.seed) for plan in tried] == [
        ("full", 1e-4, 0),
        ("full", 1e-3, 0),
        ("lora", 1e-4, 0),
        ("lora", 1e-3, 0),
    ]
    assert [(plan.method, plan.seed) for plan in tested] == [("full", 0), ("lora", 0), ("full", 1), ("lora", 1)]
    assert {plan.learning_rate for plan in tested} == {1e-3}
    assert [(one.learning_rate, one.score, one.chosen) for one in results.reported[0].candidates] == [
        (1e-4, 0.6, False),
        (1e-3, 0.7, True),
    ]
    assert trainings.timed == [["full", "lora"]]
    assert read(comparison.output).runs == results.runs


def test_methods_of_one_seed_get_the_same_examples(trainings, comparison, run):
    run(comparison)
    by_seed = {}
    for plan, task in zip(trainings.plans, trainings.tasks, strict=True):
        by_seed.setdefault(plan.seed, []).append((plan.data, task.train, task.validation))
        assert len(task.train) == 20
        assert plan.settings.max_length == 16  # all the model takes
    for same in by_seed.values():
        assert all(one == same[0] for one in same)
    assert by_seed[0][0] != by_seed[1][0]


def test_several_seeds_may_choose_the_rate(trainings, comparison, run):
    results = run(replace(comparison, tuning_seeds=2))
    assert Counter(plan.phase for plan in trainings.plans) == {"tune": 8, "test": 4}
    assert results.reported[0].candidates[0].seeds == [0, 1]


def test_a_rate_may_be_chosen_with_seeds_of_its_own(trainings, comparison, run):
    results = run(replace(comparison, tuning_seeds=[7, 8]))
    assert {plan.seed for plan in trainings.plans if plan.phase == "tune"} == {7, 8}
    assert {plan.seed for plan in trainings.plans if plan.phase == "test"} == {0, 1}
    assert results.reported[0].candidates[0].seeds == [7, 8]


def test_the_methods_own_rates_are_extended_while_the_best_is_the_last_one(trainings, comparison, run, shown):
    trainings.scores = {1e-4: 0.55, 3e-4: 0.6, 1e-3: 0.7, 3e-3: 0.8}
    results = run(replace(comparison, methods=[Choice("full"), Choice("lora")], seeds=[0]))
    tried = [(plan.method, plan.learning_rate) for plan in trainings.plans if plan.phase == "tune"]
    assert tried[:6] == [("full", rate) for rate in (3e-5, 1e-4, 3e-4)] + [
        ("lora", rate) for rate in (3e-4, 1e-3, 3e-3)
    ]
    assert tried[6:] == [("full", 1e-3), ("lora", 1e-2), ("full", 3e-3)]
    assert {run.plan.method: run.plan.learning_rate for run in results.reported} == {"full": 3e-3, "lora": 3e-3}
    assert len(results.reported[0].candidates) == 5
    assert "11/11" in shown.getvalue()
    trainings.plans.clear()
    run(replace(comparison, methods=[Choice("full"), Choice("lora")], seeds=[0]))
    assert trainings.plans == []


def test_a_single_rate_is_not_tried(trainings, comparison, run):
    results = run(replace(comparison, methods=[Choice("full", learning_rates=(1e-3,))]))
    assert {plan.phase for plan in trainings.plans} == {"test"}
    assert [one.chosen for one in results.reported[0].candidates] == [True]


def test_nothing_is_held_out_where_every_rate_is_given(trainings, comparison, run):
    one = [Choice("full", learning_rates=(1e-3,))]
    asked = replace(comparison, methods=one, settings=Settings(), train_sizes=[None])
    run(asked)
    assert [(len(task.train), len(task.validation)) for task in trainings.tasks] == [(48, 0)] * 2
    run(replace(asked, settings=Settings(validation_size=8)))
    assert len(trainings.tasks[-1].validation) == 8
    run(replace(asked, methods=comparison.methods, settings=Settings()))
    assert len(trainings.tasks[-1].validation) == 9
    with pytest.raises(ValueError, match="`validation_size` must be above 0 to choose a learning rate for full, lora"):
        run(replace(asked, methods=comparison.methods, settings=Settings(validation_size=0)))


def test_runs_and_their_time_are_said_before_they_begin(trainings, comparison, run, shown):
    run(comparison)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "Measuring a step of each method on train ..."
    assert lines[1] == "4 runs to report, 4 to choose learning rates; about 56 s left."
    assert lines[2].startswith("1/8 ")


def test_finished_runs_are_not_repeated(trainings, comparison, run, shown):
    first = run(comparison)
    trainings.plans.clear()
    trainings.timed.clear()
    assert run(comparison).runs == first.runs
    assert trainings.plans == trainings.timed == []
    more = run(replace(comparison, seeds=[0, 1, 2]))
    assert [(plan.method, plan.seed) for plan in trainings.plans] == [("full", 2), ("lora", 2)]
    assert len(more.reported) == 6
    assert "4 runs to report, 4 to choose learning rates; 8 are finished already" in shown.getvalue()
    assert "6 runs to report, 4 to choose learning rates; 8 are finished already" in shown.getvalue()


def test_steps_are_timed_again_in_another_precision(trainings, comparison, run):
    run(comparison)
    mixed = replace(comparison, settings=replace(comparison.settings, precision="bf16"))
    assert [timing.precision for timing in run(mixed).timings] == ["bf16"]
    assert len(trainings.timed) == 2


def test_other_metrics_are_other_runs(trainings, comparison, run):
    run(comparison)
    trainings.plans.clear()
    found = run(replace(comparison, own=[replace(comparison.own[0], metrics=["macro_f1"])]))
    assert len(trainings.plans) == 8
    assert {tuple(each.plan.metrics) for each in found.reported} == {("macro_f1",)}


def test_steps_are_timed_again_with_another_batch_size(trainings, comparison, run):
    run(comparison)
    run(replace(comparison, settings=replace(comparison.settings, batch_size=8)))
    assert len(trainings.timed) == 2
    run(comparison)
    assert len(trainings.timed) == 2


def test_a_cut_line_is_run_again_and_nothing_else(trainings, comparison, run):
    run(replace(comparison, timing=False))
    content = comparison.output.read_bytes()
    comparison.output.write_bytes(content[:-30])
    trainings.plans.clear()
    assert len(run(comparison).reported) == 4
    assert [(plan.method, plan.seed) for plan in trainings.plans] == [("lora", 1)]


def test_other_settings_or_other_data_are_other_runs(trainings, comparison, run, data_files):
    run(comparison)
    trainings.plans.clear()
    run(replace(comparison, settings=replace(comparison.settings, epochs=1)))
    assert len(trainings.plans) == 8
    trainings.plans.clear()
    path = data_files / "train.csv"
    path.write_text(path.read_text().replace("plot", "film"))
    run(comparison)
    assert len(trainings.plans) == 8


def test_a_crash_is_recorded_and_the_others_go_on(trainings, comparison, run, shown):
    trainings.fails = lambda plan: "ValueError: no" if (plan.method, plan.seed) == ("lora", 1) else ""
    results = run(comparison)
    failed = [item for item in results.reported if item.failed]
    assert [(item.plan.method, item.plan.seed, item.error) for item in failed] == [("lora", 1, "ValueError: no")]
    assert failed[0].versions
    assert len(results.reported) == 4
    assert "LoRA, seed 1: failed: ValueError: no" in shown.getvalue()
    log = comparison.output.with_name("runs.jsonl.failures.log").read_text()
    assert f"{failed[0].plan.key} lora train seed 1: ValueError: no\nTraceback ..." in log
    trainings.fails = lambda plan: ""
    trainings.plans.clear()
    assert not any(item.failed for item in run(comparison).reported)
    assert len(trainings.plans) == 1


def test_a_rate_that_fails_is_not_chosen(trainings, comparison, run):
    trainings.fails = lambda plan: "RuntimeError: diverged" if plan.learning_rate == 1e-3 else ""
    assert {item.plan.learning_rate for item in run(comparison).reported} == {1e-4}


def test_a_method_whose_every_try_fails_is_reported_as_failed(trainings, comparison, run):
    trainings.fails = lambda plan: "ValueError: unfit" if plan.method == "lora" else ""
    results = run(comparison)
    errors = {(item.plan.method, item.error) for item in results.reported}
    assert errors == {("full", ""), ("lora", "No learning rate could be tried: ValueError: unfit")}
    assert sum(plan.method == "lora" for plan in trainings.plans) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_finished_survives_a_stop(error, trainings, comparison, run, monkeypatch):
    kept = []

    def append(record, path, append=module.append):
        if len(kept) == 5 and not trainings.fails(None):
            raise error
        kept.append(record)
        append(record, path)

    monkeypatch.setattr(module, "append", append)
    with pytest.raises(type(error)):
        run(comparison)
    assert len(read(comparison.output).runs) == 4  # and step times
    monkeypatch.undo()
    stand_in = Trainings()
    monkeypatch.setattr(Processes, "run", stand_in)
    assert len(run(comparison).runs) == 8
    assert len(stand_in.plans) == 4


def test_runs_at_the_same_time(trainings, comparison, run):
    assert len(run(replace(comparison, jobs=3)).runs) == 8
    assert Counter(plan.key for plan in trainings.plans).most_common(1)[0][1] == 1


def test_two_comparisons_do_not_write_into_one_file(trainings, comparison, run):
    comparison.output.parent.mkdir()
    with (
        FileLock(f"{comparison.output}.lock"),
        pytest.raises(ValueError, match="is being written by another comparison"),
    ):
        run(comparison)


def test_step_times_that_cannot_be_measured_are_named(trainings, comparison, run, monkeypatch, caplog):
    def fail(apart, function, arguments, slot, report=None):
        if function is module.time_steps:
            raise WorkError("MemoryError")
        return trainings(function, arguments, slot, report)

    monkeypatch.setattr(Processes, "run", fail)
    assert run(comparison).timings == []
    assert "step times on train could not be measured: MemoryError" in caplog.text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"methods": [Choice("lorra")]}, ValueError, "`methods` must be among full"),
        ({"tasks": ["glue/colla"]}, ValueError, "`tasks` must be among train, sentiment.* got 'glue/colla'"),
        ({"train_sizes": [9999]}, ValueError, "`train_size` 9999 does not fit task 'train'"),
        ({"own": [OwnData("absent.csv")]}, DataError, "absent.csv"),
        ({"model": "nowhere/nothing"}, OSError, "nowhere/nothing"),
        ({"imports": ["no_such_module"]}, ImportError, "no_such_module"),
    ],
)
def test_what_cannot_work_is_named_before_anything_runs(fields, error, message, trainings, comparison, run):
    with pytest.raises(error, match=message):
        run(replace(comparison, **fields))
    assert trainings.plans == []
    assert not comparison.output.exists()


def test_probes_are_measured_once_before_training_and_in_no_trial(trainings, comparison, run, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["sentence1,sentence2,score", *(f"one {i},two {i},{i}" for i in range(12))]))
    results = run(replace(comparison, probes=[str(path)]))
    tried = [plan.probes for plan in trainings.plans if plan.phase == "tune"]
    assert tried == [{}] * 4
    assert {tuple(plan.probes) for plan in trainings.plans if plan.phase == "test"} == {("pairs",)}
    assert trainings.asked == 1
    assert {run.retention[0].before for run in results.reported} == {0.8}
    run(replace(comparison, probes=[str(path)], seeds=[0, 1, 2]))  # goes on with what is known
    assert trainings.asked == 1
    assert len(trainings.plans) == 4 + 6


def test_a_probe_that_cannot_be_measured_stops_before_training(trainings, comparison, run, tmp_path):
    (tmp_path / "plain.txt").write_text("some text")
    with pytest.raises(ValueError, match="with the head that it was pretrained with"):
        run(replace(comparison, probes=[str(tmp_path / "plain.txt")]))
    assert trainings.plans == []
