from __future__ import annotations

import math

import numpy as np
import pytest

from peft_dps.compare.contest import contests_of
from peft_dps.compare.mask_plots import (
    chance,
    draw_overlap,
    draw_overlap_by_layer,
    draw_selection,
    fraction,
    grid_of,
    is_flat,
    overlap,
    places,
)
from peft_dps.compare.palette import label, save, styles_of
from peft_dps.compare.plan import Plan
from peft_dps.compare.plots import draw_costs, draw_curves, draw_seeds, pareto
from peft_dps.compare.results import Results
from peft_dps.compare.run import Run, Selection


def run(method="full", seed=0, score=0.8, options=None, **fields):
    plan = Plan(method, 1e-4, "cola", seed, "tiny", options=options or {})
    return Run(plan, **{"title": method, "metrics": ["m"], "scores": {"cola": {"m": score}}, **fields})


def contest(*runs):
    (found,) = contests_of(Results({each.plan.key: each for each in runs}))
    return found


def test_pareto_front():
    #          dear, best  beaten    cheap      as cheap, worse  equal cost, better
    points = [(9, 0.9), (8, 0.5), (1, 0.3), (1, 0.2), (5, 0.8)]
    assert pareto(points) == [2, 4, 0]
    assert pareto([(1, 0.5), (1, 0.5)]) == [0]
    assert pareto([]) == []


def test_places_in_bert():
    names = [
        "base_model.model.bert.encoder.layer.11.attention.self.query",
        "base_model.model.bert.encoder.layer.0.attention.output.dense",
        "base_model.model.bert.encoder.layer.0.output.dense",
        "base_model.model.bert.pooler.dense",
        "base_model.model.classifier",
    ]
    assert list(places(names).values()) == [
        ("query", 11),
        ("attention.output.dense", 0),
        ("output.dense", 0),
        ("other", "pooler.dense"),
        ("other", "classifier"),
    ]


def test_places_of_experts_and_plain_layers():
    names = ["model.layers.3.mlp.experts.0.up", "model.layers.3.mlp.experts.7.up", "layers.0", "head"]
    assert list(places(names).values()) == [("up", 3), ("up", 3), ("other", "layers.0"), ("other", "head")]


def selections(share, later=0.5):
    return [
        Selection(1, 3, {"l.0.q": share, "l.1.q": 0.2}),
        Selection(2, 7, {"l.0.q": share, "l.1.q": 0.2}, {"l.0.q": later, "l.1.q": 0.4}),
    ]


def test_grids_are_means_over_seeds():
    runs = [run("dps", seed, selections=selections(share)) for seed, share in enumerate((0.1, 0.3))]
    failed = run("dps", 2, error="OSError: no", selections=selections(0.9))
    own = contest(*runs, failed).contenders[0]
    grid = grid_of(own, fraction)
    assert (grid.names, grid.cycles) == (("l.0.q", "l.1.q"), (1, 2))
    np.testing.assert_allclose(grid.values, 0.2)
    assert is_flat(grid)
    np.testing.assert_allclose(grid_of(own, overlap).values, [[0.5], [0.4]])
    # Two random masks of 20% share 4% of all entries, of the 36% that are in one of them.
    assert chance(own) == pytest.approx({2: 0.04 / 0.36})


def test_equal_shares_are_not_drawn():
    assert draw_selection(contest(run("dps", selections=selections(0.2)))) is None
    assert draw_selection(contest(run("dps", selections=selections(0.6)))) is not None
    assert draw_selection(contest(run())) is None
    assert draw_overlap(contest(run()), {}) is None
    assert draw_curves(contest(run()), {}) is None


def test_a_map_of_equal_numbers_is_drawn(tmp_path):
    figure = draw_overlap_by_layer(contest(run("dps", selections=selections(0.2, later=0.4))))
    save(figure, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_styles_are_told_apart_without_colour():
    methods = ["full", "full-nodropout", "dps-dense", *(f"mine{index}" for index in range(30))]
    runs = [run(method) for method in methods]
    runs += [run("dps-dense", options={"density": density}) for density in (0.1, 0.5)]
    runs += [run("dps-dense", options={"density": 0.1, "dropout": False})]
    styles = styles_of([contest(*runs)])
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
    plain = styles_of([contest(run("dps-mix"))])["dps-mix"]
    assert styles_of([contest(run("dps-mix", options={"scope": "model"}))])['dps-mix:{"scope": "model"}'] == plain


@pytest.mark.parametrize("title", ["$\\frac{1}$", "a $ b", "_^{", "x" * 200])
def test_titles_are_drawn_as_they_are(title, tmp_path):
    found = contest(run(title=title), run("lora", title=title, score=math.nan))
    styles = styles_of([found])
    for number, figure in enumerate((draw_costs(found, styles), draw_seeds(found, styles))):
        save(figure, tmp_path / f"{number}.png")
    assert "$" not in label("a $ b").replace(r"\$", "")


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    found = contest(run(losses=[0.5, math.nan, 0.3]), run("lora", losses=[0.4] * 3))
    for name in "ab":
        save(draw_curves(found, styles_of([found])), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
