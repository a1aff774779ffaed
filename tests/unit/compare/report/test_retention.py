from __future__ import annotations

import math

import pytest

from peft_dps.compare.report.conclusion import conclusion
from peft_dps.compare.report.csv_files import csv_files
from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.overview import overview_table
from peft_dps.compare.report.retention import kept, measures_of, retention_table
from peft_dps.compare.report.retention_plot import draw_retention
from peft_dps.compare.report.style import styles_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Retention, Run


def run(method, seed, gain, kept=None, loss=None, error=""):
    plan = Plan(method, 1e-4, "movie", seed, "tiny", probes={"pairs": "f"})
    asked = [("pairs", "spearman", 0.8, kept), ("text", "loss", 2.0, loss)]
    retention = [Retention(*each) for each in asked if each[-1] is not None]
    scores = {name: {"m": gain - 0.1 * place} for place, name in enumerate(("movie", "books", "news"))}
    return Run(plan, method, error, ["m"], {} if error else scores, retention)


def experiment(*runs):
    (found,) = experiments_of(Results({each.plan.key: each for each in runs}))
    return found


@pytest.fixture
def six_seeds():
    full = [run("full", seed, 0.9 + 0.001 * seed, 0.5 + 0.01 * seed, 3.0) for seed in range(6)]
    lora = [run("lora", seed, 0.9 + 0.001 * seed, 0.7 + 0.01 * seed, 2.5 + 0.01 * seed) for seed in range(6)]
    return experiment(*full, *lora)


def cells(table, method):
    (row,) = [row for row in table.rows if row[0] == method]
    return dict(zip(table.header, row, strict=True))


def test_measures_are_the_probes_and_the_other_domains(six_seeds):
    assert [(each.title, each.metric) for each in measures_of(six_seeds)] == [
        ("pairs", "spearman"),
        ("text", "loss"),
        ("other domains", "m"),
    ]
    assert measures_of(experiment(run("full", 0, 0.9))) == []


def test_a_table_says_what_was_kept_beside_what_was_gained(six_seeds):
    pairs, text, others = (retention_table(six_seeds, measure) for measure in measures_of(six_seeds))
    own = cells(pairs, "lora")
    assert (own["gained: movie"], own["kept: pairs"], own["change"]) == ("90.25", "72.50", "-7.50")
    assert (own["vs full"], own["p"]) == ("+20.00", "0.0312")
    assert pairs.best == {1}
    assert cells(text, "full")["change"] == "+1.000"
    own = cells(text, "lora")
    assert (own["kept: text"], own["95% interval"]) == ("2.525", "2.512 to 2.538")
    assert (own["vs full"], own["std"]) == ("-0.475", "0.019")
    assert text.best == {1}
    assert text.notes == ("Before training: 2.000.", "Beyond chance, lora (-0.48) keeps more of text.")
    assert cells(others, "full")["transfer: other domains"] == "75.25"
    assert "change" not in others.header


def test_the_conclusion_says_what_is_kept(six_seeds):
    said = (
        "what it was not trained for goes with full from 80.0 to 52.5 on pairs and from 2.00 to 3.00 on text (loss); "
        "beyond chance, lora (+20.0) keeps more of pairs; beyond chance, lora (-0.48) keeps more of text"
    )
    assert kept([six_seeds]) == said
    assert f"; {said}" in conclusion([six_seeds])
    assert kept([six_seeds, six_seeds]) == kept([experiment(run("full", 0, 0.9))]) == ""


def test_of_many_methods_the_conclusion_tells_the_number():
    methods = {"full": 0.5, "lora": 0.7, "bitfit": 0.75, "houlsby": 0.6, "pfeiffer": 0.65}
    runs = [
        run(method, seed, 0.9 + 0.001 * seed, keeps + 0.01 * seed)
        for method, keeps in methods.items()
        for seed in range(10)
    ]
    assert "; beyond chance, 4 methods keep more of pairs, above all bitfit (+25.0)" in kept([experiment(*runs)])


def test_failed_runs_keep_nothing():
    found = experiment(run("full", 0, 0.9, 0.5), run("lora", 0, 0.9, error="OSError: no"))
    (measure, _) = measures_of(found)
    assert cells(retention_table(found, measure), "lora")["kept: pairs"] == "-"
    assert math.isnan(next(each for each in found.methods if each.variant == "lora").scores("probe/pairs")[0])
    assert draw_retention(found, measure, styles_of([found])) is not None


def test_numbers_go_into_files_in_their_own_unit(six_seeds):
    files = csv_files([six_seeds])
    (row,) = [row for row in files["retention.csv"].splitlines() if ",lora," in row and ",text," in row]
    assert ",text,loss,2.000000,2.525000,2.511667,2.538333,-0.475000," in row
    assert sum(",probe/pairs," in row for row in files["runs.csv"].splitlines()) == 12
    assert "retention.csv" not in csv_files([experiment(run("full", 0, 0.9))])


def test_the_overview_has_them(six_seeds):
    own = cells(overview_table(six_seeds), "lora")
    assert (own["kept: pairs"], own["kept: text"]) == ("72.50", "2.525")


def test_a_measure_is_drawn_with_what_was_before(six_seeds):
    pairs, text, _ = (draw_retention(six_seeds, each, styles_of([six_seeds])) for each in measures_of(six_seeds))
    (axes,) = pairs.axes
    assert axes.get_ylabel() == "kept: pairs\n100 x spearman"
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_label() == "before training"] == [80.0]
    assert text.axes[0].yaxis_inverted()
