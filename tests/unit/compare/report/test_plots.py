from __future__ import annotations

import math

import pytest

from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.plots import draw_costs, draw_curves, draw_seeds
from peft_dps.compare.report.style import label, save, styles_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Run


def run(method="full", seed=0, score=0.8, options=None, **fields):
    plan = Plan(method, 1e-4, "cola", seed, "tiny", options=options or {})
    return Run(plan, **{"title": method, "metrics": ["m"], "scores": {"cola": {"m": score}}, **fields})


def experiment(*runs):
    (found,) = experiments_of(Results({each.plan.key: each for each in runs}))
    return found


def test_runs_without_a_course_have_no_curves():
    assert draw_curves(experiment(run()), {}) is None


def test_styles_are_told_apart_without_colour():
    methods = ["full", "full-nodropout", "dps-dense", *(f"mine{index}" for index in range(30))]
    runs = [run(method) for method in methods]
    runs += [run("dps-dense", options={"density": density}) for density in (0.1, 0.5)]
    runs += [run("dps-dense", options={"density": 0.1, "dropout": False})]
    styles = styles_of([experiment(*runs)])
    assert len(set(styles.values())) == len(runs)
    assert styles["full"].color == styles["full-nodropout"].color
    assert (styles["full"].filled, styles["full-nodropout"].filled) == (True, False)
    with_dropout, without = (
        styles['dps-dense:{"density": 0.1}'],
        styles['dps-dense:{"density": 0.1, "dropout": false}'],
    )
    assert with_dropout.marker == without.marker
    assert not without.filled


def test_the_first_variant_of_a_method_looks_like_the_method():
    plain = styles_of([experiment(run("dps-mix"))])["dps-mix"]
    assert styles_of([experiment(run("dps-mix", options={"scope": "model"}))])['dps-mix:{"scope": "model"}'] == plain


@pytest.mark.parametrize("title", ["$\\frac{1}$", "a $ b", "_^{", "x" * 200])
def test_titles_are_drawn_as_they_are(title, tmp_path):
    found = experiment(run(title=title), run("lora", title=title, score=math.nan))
    styles = styles_of([found])
    for number, figure in enumerate((draw_costs(found, styles), draw_seeds(found, "cola", styles))):
        save(figure, tmp_path / f"{number}.png")
    assert "$" not in label("a $ b").replace(r"\$", "")


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    found = experiment(run(losses=[0.5, math.nan, 0.3]), run("lora", losses=[0.4] * 3))
    for name in "ab":
        save(draw_curves(found, styles_of([found])), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
