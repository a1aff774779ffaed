from __future__ import annotations

from dataclasses import replace

import pytest

from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.tables import cost_table, overall_table, score_table, setup_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Candidate, Evaluation, Run, Timing
from peft_dps.compare.settings import Settings


def run(method, seed, score, task="cola", **fields):
    plan = Plan(method, 1e-4, task, seed, "tiny")
    if score is None:
        return Run(plan, method, "OSError: no", ["m"])
    looks = [Evaluation(1, 0.1, score)]
    return Run(plan, method, "", ["m"], {task: {"m": score}}, evaluations=looks, seconds=12.0, **fields)


def experiments(*runs, timings=()):
    return experiments_of(Results({each.plan.key: each for each in runs}, list(timings)))


def cells(table, method):
    (row,) = [row for row in table.rows if row[0] == method]
    return dict(zip(table.header, row, strict=True))


def test_scores():
    full = [run("full", seed, 0.5 + 0.01 * seed) for seed in range(5)]
    lora = [run("lora", seed, 0.6 + 0.01 * seed if seed else None) for seed in range(4)]
    (experiment,) = experiments(*full, *lora)
    table = score_table(experiment, "cola")
    assert table.title == "cola: 100 x m"
    assert cells(table, "full") == {
        "method": "full",
        "seeds": "5",
        "mean": "52.00",
        "std": "1.58",
        "95% interval": "50.80 to 53.20",
        "vs full": "-",
        "p": "-",
        "p (Holm)": "-",
        "mean rank": "1.60",
    }
    own = cells(table, "lora")
    assert (own["seeds"], own["mean"], own["vs full"]) == ("3 (1 failed, 1 missing)", "62.00", "+10.00")
    assert (own["p"], own["p (Holm)"]) == ("0.2500", "0.2500")
    assert table.best == {1}
    assert table.notes == (
        (
            "Highest mean: lora, 62.00. No method differs from full beyond chance, which 3 pairs of runs could not "
            "show: it takes 6."
        ),
    )


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (0.1, "Beyond chance, lora (+10.0) differs from full."),
        (-0.1, "Beyond chance, lora (-10.0) differs from full."),
        (0.0, "No method differs from full beyond chance."),
    ],
)
def test_what_seven_seeds_tell(gain, verdict):
    runs = [
        run(name, seed, 0.5 + 0.01 * seed + more) for name, more in (("full", 0), ("lora", gain)) for seed in range(7)
    ]
    table = score_table(experiments(*runs)[0], "cola")
    assert verdict in table.notes[0]


def test_equal_means_are_named_together():
    table = score_table(experiments(run("full", 0, 0.5), run("lora", 0, 0.5))[0], "cola")
    assert table.notes[0] == "Highest mean: full and lora, 50.00. One seed cannot tell a method from full."
    assert table.best == {0, 1}


def test_one_seed_has_no_columns_of_what_it_cannot_tell():
    (experiment,) = experiments(run("full", 0, 0.5), run("lora", 0, 0.6))
    assert score_table(experiment, "cola").header == ("method", "seeds", "mean", "vs full", "mean rank")


def test_costs():
    timing = Timing("tiny", "cola", 16, 32, {"full": [1.0, 1.0], "lora": [0.5, 0.5]})
    sizes = {"trainable": 1_234_567, "peak_memory": 300 * 2**20, "file_size": 2**19, "memory_kind": "cuda"}
    (experiment,) = experiments(run("full", 0, 0.5, **sizes), run("lora", 0, 0.4, **sizes), timings=[timing])
    table = cost_table(experiment)
    assert cells(table, "lora") == {
        "method": "lora",
        "learning rate": "0.0001",
        "entries trained": "1.23M",
        "steps to score of full": "never (0 of 1)",
        "step time": "0.50 x",
        "training time": "12 s",
        "peak memory (cuda)": "300 MiB",
        "file size": "0.50 MiB",
    }
    assert cells(table, "full")["steps to score of full"] == "1 (1 of 1)"
    assert table.notes[0] == "Trained in fp32, 16 examples a step, 3 epochs."
    assert (
        "median of 2 rounds in which each method took one step in turn, of 16 examples of 32 tokens" in table.notes[1]
    )


def test_costs_without_timed_steps_are_in_steps():
    plan = Plan("full", 1e-4, "cola", 0, "tiny", settings=Settings(precision="bf16"))
    looks = [Evaluation(1, 0.1, 0.5)]
    (experiment,) = experiments(Run(plan, "full", "", ["m"], {"cola": {"m": 0.5}}, evaluations=looks))
    table = cost_table(experiment)
    assert cells(table, "full")["steps to score of full"] == "1 (1 of 1)"
    assert "step time" not in table.header
    assert table.notes[0] == "Trained in bf16 (mixed precision), 16 examples a step, 3 epochs."


def test_overall_is_sorted_by_rank():
    runs = [run(name, 0, score, task) for task in ("a", "b") for name, score in (("full", 0.5), ("lora", 0.6))]
    table = overall_table(experiments(*runs))
    assert [row[0] for row in table.rows] == ["lora", "full"]
    own = cells(table, "lora")
    assert (own["mean rank"], own["vs full"], own["tasks better"], own["pairs"]) == ("1.00", "+10.00", "2 of 2", "2")


def test_tasks_together_say_that_rates_were_chosen_once():
    runs = [run(name, 0, 0.5, task) for task in ("a", "b") for name in ("full", "lora")]
    assert "chosen once" not in " ".join(overall_table(experiments(*runs)).notes)
    tried = [Candidate(rate, [0], 0.5, rate == 1e-4) for rate in (1e-4, 3e-4)]
    chosen = [replace(each, candidates=tried) for each in runs]
    assert "chosen once" not in " ".join(overall_table(experiments(*chosen)).notes)  # the same for all methods
    chosen[0] = replace(chosen[0], plan=replace(chosen[0].plan, learning_rate=3e-4))
    assert "each method's was chosen once a task" in overall_table(experiments(*chosen)).notes[0]


def test_methods_without_dropout_are_set_beside_full_fine_tuning_without_it():
    scores = {"full": 0.5, "full-nodropout": 0.6, "lora": 0.7, "lora-nodropout": 0.62, "dps-dense-nodropout": 0.55}
    runs = [run(name, seed, score, task) for task in ("a", "b") for seed in (0, 1) for name, score in scores.items()]
    found = experiments(*runs)
    expected = (
        "Like for like, beside full-nodropout: lora-nodropout +2.00 (p {0}, Holm {1}); "
        "dps-dense-nodropout -5.00 (p {0}, Holm {1})."
    )
    assert score_table(found[0], "a").notes[-1] == expected.format("0.5000", "1.0000")
    assert overall_table(found).notes[-1] == expected.format("0.1250", "0.2500")
    partly = experiments(*(each for each in runs if (each.plan.task, each.plan.method) != ("b", "full-nodropout")))
    assert "beside full-nodropout, on 1 of 2 tasks: " in overall_table(partly).notes[-1]
    asked_for = experiments_of(Results({each.plan.key: each for each in runs}), "lora")
    assert "Like for like" not in " ".join(score_table(asked_for[0], "a").notes)
    by_option = [
        replace(each, plan=replace(each.plan, method="full", options={"dropout": False}))
        for each in runs
        if each.plan.method == "full-nodropout"
    ]
    others = [each for each in runs if each.plan.method != "full-nodropout"]
    assert "Like for like, beside full" in score_table(experiments(*others, *by_option)[0], "a").notes[-1]
    alone = experiments(*others)
    assert "Like for like" not in " ".join(score_table(alone[0], "a").notes)


def test_setup_names_all_hardware():
    runs = [
        run("full", seed, 0.5, hardware={"gpu": None, "cores": cores, "memory": 2**33})
        for seed, cores in ((0, 2), (1, 4))
    ]
    told = dict(setup_of(experiments(*runs)[0]))
    assert told["hardware"] == "cores 2, memory 8 GiB; or cores 4, memory 8 GiB"
    assert told["seeds"] == "0, 1"
    assert "batch size 16" in told["budget of every method"]
