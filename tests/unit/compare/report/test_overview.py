from __future__ import annotations

import math

from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.overview import overview_table
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Run, Selection, Timing


def run(method, seed, score, metric="accuracy", **fields):
    values = {"scores": {"near": {metric: score}, "far": {metric: score - 0.1}}, "examples": {"test/near": 500}}
    return Run(Plan(method, 1e-4, "near", seed, "tiny"), method, metrics=[metric], **{**values, **fields})


def dps(seed, status="step 9, subnetwork 3/3"):
    parts = {"selections": [Selection(1, 4, 6)], "status": status}
    return run("dps", seed, 0.7, trainable=1000, peak_memory=20 * 2**20, file_size=2**21, **parts)


def overview(*runs, timings=()):
    (experiment,) = experiments_of(Results({each.plan.key: each for each in runs}, list(timings)))
    return overview_table(experiment)


def test_a_row_has_all_domains_and_costs():
    timing = Timing("tiny", "near", 16, 32, {"full": [1.0], "dps": [1.1]})
    table = overview(run("full", 0, 0.8), run("full", 1, 0.9), dps(0), dps(1), timings=[timing])
    assert table.title == "near, all training examples: 100 x accuracy, mean \u00b1 std over 2 seeds"
    assert table.header == (
        "method",
        "near (in domain)",
        "far",
        "entries trained",
        "step time",
        "peak memory",
        "file size",
    )
    assert table.rows[0][:3] == ("full", "85.0 \u00b1 7.1", "75.0 \u00b1 7.1")
    assert table.rows[1] == ("dps", "70.0 \u00b1 0.0", "60.0 \u00b1 0.0", "1k", "1.10 x", "20 MiB", "2.00 MiB")


def test_the_proof_that_dps_engaged_is_in_its_own_words():
    table = overview(run("full", 0, 0.8), run("full", 1, 0.8), dps(0, ""), dps(1))
    assert table.notes == (
        (
            "Proof that dps engaged, in 1 of 2 runs; with seed 1, at the end of its last SUBNETWORK: step 9, "
            "subnetwork 3/3."
        ),
    )
    assert overview(run("full", 0, 0.8), dps(0)).notes[-1] == (
        "Proof that dps engaged, at the end of its last SUBNETWORK: step 9, subnetwork 3/3."
    )


def test_one_seed_is_named_as_what_it_is():
    (note,) = overview(run("full", 0, 0.8, examples={"test/near": 500, "test/far": 400, "train": 10})).notes
    assert note == (
        "One seed and 400 or more test examples a domain: each accuracy is uncertain by up to 4.9 points, so smaller "
        "differences say nothing."
    )
    (note,) = overview(run("full", 0, 0.8, "f1")).notes
    assert "is not known, so small differences say nothing" in note


def test_failures_are_counted():
    failed = Run(Plan("lora", 1e-4, "near", 0, "tiny"), "lora", "OSError: no", ["accuracy"])
    unnumbered = run("bitfit", 0, math.nan)
    table = overview(run("full", 0, 0.8), failed, unnumbered)
    assert table.header[-4:] == ("entries trained", "failed runs", "peak memory", "file size")
    assert table.rows[1] == ("lora", "-", "-", "-", "1", "-", "-")
    assert table.rows[2][:3] == ("bitfit", "-", "-")
    assert overview(failed).rows == (("lora", "1"),)
