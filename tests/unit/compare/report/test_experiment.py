from __future__ import annotations

import dataclasses
import math

from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Run, Timing
from peft_dps.compare.settings import Settings


def run(method="full", seed=0, score=0.8, **fields):
    names = {field.name for field in dataclasses.fields(Plan)} - {"metrics"}
    base = {"method": method, "learning_rate": 1e-4, "task": "cola", "seed": seed, "model": "tiny"}
    plan = Plan(**{**base, **{name: value for name, value in fields.items() if name in names}})
    values = {"title": method.upper(), "metrics": ["accuracy"], "scores": {"cola": {"accuracy": score}}}
    return Run(plan, **{**values, **{name: value for name, value in fields.items() if name not in names}})


def experiments(*runs, timings=()):
    return experiments_of(Results({each.plan.key: each for each in runs}, list(timings)))


def test_methods_of_one_task_size_model_and_budget_meet():
    found = experiments(
        run(),
        run("lora"),
        run("lora", seed=1),
        run("lora", phase="tune"),
        run(train_size=500),
        run("lora", train_size=500),
        run(task="rte"),
    )
    assert [experiment.name for experiment in found] == [
        "cola, all training examples",
        "cola, 500 training examples",
        "rte, all training examples",
    ]
    assert [[each.variant for each in experiment.methods] for experiment in found] == [["full", "lora"]] * 2 + [
        ["full"]
    ]
    assert found[0].seeds == (0, 1)
    assert len(found[0].runs) == 3


def test_names_tell_what_differs_and_slugs_are_unique():
    found = experiments(run(), run(model="other"), run(settings=Settings(epochs=5)), run(task="Cola"))
    assert [experiment.name for experiment in found] == [
        "cola, all training examples, tiny, epochs 3",
        "cola, all training examples, other, epochs 3",
        "cola, all training examples, tiny, epochs 5",
        "Cola, all training examples, tiny, epochs 3",
    ]
    assert len({experiment.slug for experiment in found}) == 4


def test_experiments_that_differ_in_precision_alone_are_told_apart():
    found = experiments(run(), run(settings=Settings(precision="bf16")))
    assert [experiment.name for experiment in found] == [
        "cola, all training examples, precision fp32",
        "cola, all training examples, precision bf16",
    ]


def test_what_is_scored_otherwise_is_not_compared():
    other = run("lora")
    found = experiments(run(), dataclasses.replace(other, plan=dataclasses.replace(other.plan, metrics=("macro_f1",))))
    assert [experiment.name for experiment in found] == [
        "cola, all training examples, scored by the task",
        "cola, all training examples, scored by macro_f1",
    ]
    assert [len(experiment.methods) for experiment in found] == [1, 1]


def timing(*variants, **fields):
    values = {"model": "tiny", "task": "cola", "batch_size": 16, "tokens": 8, **fields}
    return Timing(**values, seconds={variant: [1.0] for variant in variants})


def test_step_times_are_those_of_the_budget_that_cover_the_most_methods():
    small, both, again = timing("full", "lora", batch_size=4), timing("full", "lora"), timing("full", "lora", tokens=9)
    short, other = timing("full", "lora", max_length=16), timing("lora", "bitfit")
    runs = (run(), run("lora"), run("bitfit"))
    (experiment,) = experiments(*runs, timings=[small, both, again, short, other, timing("mix")])
    assert experiment.timing is again
    assert experiments(*runs, timings=[small, short, timing("mix")])[0].timing is None
    assert experiments(*runs, timings=[other])[0].timing is other


def test_the_reference_comes_first_and_titles_are_told_apart():
    options = [{"density": 0.1}, {"density": 0.5}]
    (experiment,) = experiments(*(run("dps", title="DPS", options=each) for each in options), run("bitfit"), run())
    assert [each.title for each in experiment.methods] == [
        "FULL",
        'DPS [dps:{"density": 0.1}]',
        'DPS [dps:{"density": 0.5}]',
        "BITFIT",
    ]
    assert experiment.reference is experiment.methods[0]


def test_without_full_fine_tuning_the_first_method_is_the_reference():
    (experiment,) = experiments(run("lora"), run("bitfit"), run("lora", seed=1))
    assert experiment.reference_variant == "lora"
    assert [each.variant for each in experiment.methods] == ["lora", "bitfit"]


def test_a_task_without_the_reference_of_the_others_has_none():
    first, second = experiments(run(), run("lora", task="rte"))
    assert first.reference is first.methods[0]
    assert second.reference is None


def test_a_later_run_of_the_same_seed_counts_unless_it_failed():
    first, second = run(learning_rate=1e-5, score=0.1), run(learning_rate=1e-3, score=0.9)
    failed = run(learning_rate=1e-2, error="ValueError: no", scores={})
    (experiment,) = experiments(first, second, failed)
    assert experiment.methods[0].runs == {0: second}
    assert experiment.superseded == (first, failed)
    (experiment,) = experiments(failed, first)
    assert experiment.methods[0].runs == {0: first}


def test_scores_that_are_missing_are_nan():
    (experiment,) = experiments(run(), run(seed=1, error="OSError: disk", scores={}), run(seed=2, score=math.nan))
    scores = experiment.methods[0].scores("cola")
    assert scores[0] == 0.8
    assert math.isnan(scores[1])
    assert math.isnan(scores[2])
    assert math.isnan(experiment.methods[0].scores("elsewhere")[0])


def test_a_experiment_in_which_everything_failed_has_no_domains():
    (experiment,) = experiments(run(error="OSError: disk", scores={}, metrics=[]))
    assert experiment.domains == ()
    assert experiment.metric == "score"


def test_the_latest_timing_of_the_same_model_and_task_counts():
    timings = [Timing("tiny", "cola", 16, 32, {"full": [time]}) for time in (1.0, 2.0)]
    timings += [Timing("tiny", "rte", 16, 32, {}), Timing("other", "cola", 16, 32, {})]
    assert experiments(run(), timings=timings)[0].timing == timings[1]


def test_steps_timed_with_another_attention_do_not_count():
    timing = Timing("tiny", "cola", 16, 32, {"full": [1.0]}, attention="eager")
    by_default, eager = experiments(run(), run(settings=Settings(attention="eager")), timings=[timing])
    assert (by_default.timing, eager.timing) == (None, timing)


def test_steps_timed_in_another_precision_do_not_count():
    timing = Timing("tiny", "cola", 16, 32, {"full": [1.0]}, precision="bf16")
    plain, mixed = experiments(run(), run(settings=Settings(precision="bf16")), timings=[timing])
    assert plain.timing is None
    assert mixed.timing == timing
