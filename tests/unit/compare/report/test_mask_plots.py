from __future__ import annotations

import pytest

from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.mask_plots import draw_overlap, draw_selection, fractions, overlaps, places
from peft_dps.compare.report.style import save, styles_of
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Run, Selection


def run(method="full", seed=0, **fields):
    plan = Plan(method, 1e-4, "cola", seed, "tiny")
    return Run(plan, **{"title": method, "metrics": ["m"], "scores": {"cola": {"m": 0.8}}, **fields})


def experiment(*runs):
    (found,) = experiments_of(Results({each.plan.key: each for each in runs}))
    return found


def selections(overlap):
    return [Selection(1, 3, 4), Selection(2, 7, 8, [overlap, overlap - 0.1, overlap + 0.1], 0.2)]


def test_overlaps_are_means_over_the_seeds_that_finished():
    runs = [run("dps", seed, selections=selections(overlap)) for seed, overlap in enumerate((0.4, 0.6))]
    failed = run("dps", 2, error="OSError: no", selections=selections(0.9))
    found = overlaps(experiment(*runs, failed).methods[0])
    assert list(found) == [2]  # the first cycle has nothing before it
    assert list(found[2]) == pytest.approx([0.5, 0.4, 0.6, 0.2])


def test_fractions_are_means_over_the_seeds():
    runs = [run("dps", seed, fractions={"l.0.q": share}) for seed, share in enumerate((0.1, 0.3))]
    assert fractions(experiment(*runs).methods[0]) == {"l.0.q": pytest.approx((0.1, 0.2, 0.3))}


def test_figures_are_drawn_of_what_there_is(tmp_path):
    assert draw_overlap(experiment(run()), {}) is None
    assert draw_selection(experiment(run("dps", selections=selections(0.5)))) is None
    found = experiment(run("dps", selections=selections(0.5), fractions={"l.0.q": 0.1, "l.1.q": 0.3, "a.b.head": 0.2}))
    for number, figure in enumerate((draw_overlap(found, styles_of([found])), draw_selection(found))):
        save(figure, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


def test_places_in_models():
    names = [
        "bert.encoder.layer.11.attention.self.query",
        "bert.encoder.layer.0.output.dense",
        "bert.pooler.dense",
        "model.layers.3.mlp.experts.7.up",
        "layers.0",
        "head",
    ]
    assert list(places(names).values()) == [
        ("attention.self.query", "11"),
        ("output.dense", "0"),
        ("pooler.dense", "-"),
        ("mlp.experts.7.up", "3"),
        ("layers.0", "0"),
        ("head", "-"),
    ]
