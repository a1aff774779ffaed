from __future__ import annotations

import math
from dataclasses import replace

import pytest

from peft_dps.compare.report.checks import checks
from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Candidate, Run, Selection, Timing


def run(method="full", seed=0, *, data="d", rate=1e-4, score=0.8, **fields):
    plan = Plan(method, rate, "cola", seed, "tiny", data=data)
    return Run(plan, **{"title": method, "metrics": ["m"], "scores": {"cola": {"m": score}}, **fields})


def said(*runs, reference=None):
    (experiment,) = experiments_of(Results({each.plan.key: each for each in runs}), reference)
    return checks(experiment)


def test_nothing_is_said_of_a_fair_experiment():
    selected = {"status": "DPS ...", "selections": [Selection(1, 3, 4)], "frozen_moved": False}
    rates = [Candidate(rate, [0], 0.5, chosen=rate == 1e-4) for rate in (1e-5, 1e-4, 1e-3)]
    fair = {"order": "same", "candidates": rates, "memory_kind": "resident"}
    assert said(run(**fair), run("dps", **fair, **selected)) == []


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"error": "OSError: disk full", "scores": {}}, "other failed with seed 0: OSError: disk full"),
        ({"score": math.nan}, "other has no number with seed 0 on cola"),
        ({"seed": 1}, "other was not run with seed 0."),
        ({"data": "changed"}, "The examples differ between methods with seed 0"),
        ({"order": "two"}, "The order of the training examples differ"),
        ({"hardware": {"gpu": "H"}}, "The runs had different hardware"),
        ({"versions": {"torch": "1"}}, "The runs had different package versions"),
        ({"memory_kind": "cuda"}, "The runs had different kinds of memory"),
        ({"status": "no subnetwork yet"}, "training ended before a subnetwork was selected"),
        ({"frozen_moved": True, "config": {"frozen": "exact"}}, "frozen entries moved in SUBNETWORK"),
        ({"candidates": [Candidate(1e-4, [0], 1, chosen=True), Candidate(1e-5, [0], 0)]}, "the largest learning rate"),
        (
            {"candidates": [Candidate(1e-4, [0], 1, chosen=True), Candidate(1e-3, [0], 0)]},
            "the smallest learning rate",
        ),
    ],
)
def test_what_is_wrong_is_said(other, expected):
    found = said(run(order="one"), run("other", **{"order": "one", **other}))
    assert any(expected in sentence for sentence in found), found


def test_seeds_with_rates_of_their_own_are_named():
    runs = [run(seed=0, rate=1e-4), run(seed=1, rate=3e-4)]
    assert any(
        "full: the seeds do not have one learning rate (0.0001, 0.0003)" in sentence for sentence in said(*runs)
    )


def test_step_times_of_other_versions_are_named():
    made = run(versions={"torch": "1", "peft": "2"})
    for versions, found in (({"torch": "1", "peft": "2"}, False), ({"torch": "3", "peft": "2"}, True)):
        timing = Timing("tiny", "cola", 16, 8, {"full": [1.0]}, versions=versions)
        (experiment,) = experiments_of(Results({made.plan.key: made}, [timing]))
        said_so = "Step times were measured with other versions than the runs had, of torch." in checks(experiment)
        assert said_so is found


def test_seeds_that_score_alike_have_probably_learned_nothing():
    constant = [run("one", seed, score=0.684) for seed in range(3)]
    good = [run("all", seed, score=1.0) for seed in range(3)]
    alive = [run("full", seed, score=0.7 + seed / 100) for seed in range(3)]
    (sentence,) = said(*alive, *good, *constant)
    assert sentence.startswith("All seeds have the same score on cola with one: these models probably give every")
    assert said(*alive[:2], *constant[:2]) == []


def test_a_learning_rate_that_was_given_is_said():
    given = [Candidate(1e-4, [], math.nan, chosen=True)]
    assert said(run(candidates=given), run("other", candidates=given)) == [
        "The learning rate was given, and not chosen among several, for full, other."
    ]


def test_a_rate_is_given_whatever_else_the_file_has_tried():
    given = [Candidate(1e-4, [], math.nan, chosen=True)]
    tries = [replace(each, plan=replace(each.plan, phase="tune")) for each in (run(rate=1e-4), run(rate=1e-3))]
    assert said(run(candidates=given), *tries) == [
        "The learning rate was given, and not chosen among several, for full."
    ]


def test_rates_that_were_tried_later_count():
    tried = [Candidate(1e-4, [0], 1, chosen=True), Candidate(1e-5, [0], 0)]
    tries = [replace(each, plan=replace(each.plan, phase="tune")) for each in (run(rate=1e-4), run(rate=1e-3))]
    assert said(run(candidates=tried), *tries) == []
    assert len(said(run(candidates=tried), tries[0])) == 1


@pytest.mark.parametrize("policy", ["gradient", "scaled_gradient"])
def test_frozen_entries_may_move_under_the_policies_of_gradients(policy):
    assert said(run(), run("other", frozen_moved=True, config={"frozen": policy})) == []


def test_a_schedule_that_trains_all_selects_nothing():
    assert said(run(), run("other", status="full 24", selections=None, config={"schedule": "full"})) == []


def test_a_missing_reference_is_said():
    assert said(run("lora"), reference="full") == ["There is no run of 'full', so nothing is tested against it."]


def test_a_run_that_another_replaced_is_said():
    (sentence,) = said(run(rate=1e-3, score=0.25), run())
    assert "learning rate 0.001, score 0.2500" in sentence
