import json
import os
from importlib.metadata import distributions
from itertools import product
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.memory import KINDS
from benchmarks.ratio import Spread
from benchmarks.rounds import FIGURES
from benchmarks.variant import COMPARISONS, VARIANTS

pytestmark = pytest.mark.slow  # it starts a process for each variant


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "dense.json"
    main(
        "--size toy --batch 2 --tokens 8 --stage-steps 2 --cycles 2 --warmup 1 --threads 1 --optimizer adamw-foreach "
        f"--out {path} --variants {' '.join(VARIANTS)}".split()
    )
    return path.read_text()


@pytest.fixture(scope="module")
def document(output):
    return json.loads(output)


def test_every_comparison_has_every_figure(document):
    found = {(each["variant"], each["against"], each["figure"]) for each in document["step_ratios"]}
    assert found == {(*pair, figure) for pair, figure in product(COMPARISONS, FIGURES)}
    counts = {"accumulate": 3, "selecting": 2, "subnetwork": 2}
    for ratio in document["step_ratios"]:
        for reading in ("step", "own", "cpu"):
            assert ratio[reading]["lower"] <= ratio[reading]["median"] <= ratio[reading]["upper"]
            assert ratio[reading]["count"] == counts[ratio["figure"]]
    assert [(each["variant"], each["against"]) for each in document["memory_ratios"]] == list(COMPARISONS)


def test_every_variant_takes_every_step(document):
    assert set(document["variants"]) == set(VARIANTS)
    assert [each["number"] for each in document["rounds"]] == list(range(1, 9))
    assert [each["figure"][:2] for each in document["rounds"]] == ["ac", "ac", "se", "su"] * 2
    assert all(set(each["times"]) == set(VARIANTS) for each in document["rounds"])


def test_dps_took_place(document):
    for name, variant in document["variants"].items():
        if name.startswith("full"):
            assert variant["selected_fraction"] is None
        else:
            assert variant["selected_fraction"] == pytest.approx(0.7, abs=0.01)
            # With "gradient" the momentum of ACCUMULATE moves frozen entries on.
            assert variant["frozen_moved"] is (name == "dps-gradient")


def test_variants_that_are_compared_first_train_the_same_entries(document):
    entries = {name: variant["trained_entries"] for name, variant in document["variants"].items()}
    assert entries["dps-exact"] == entries["dps-gradient"] == entries["full-linear"] < entries["full"]
    assert entries["dps-remaining"] == entries["full"]


def test_tensors_are_counted_by_kind(document):
    exact = document["variants"]["dps-exact"]["tensors"]
    assert set(exact["accumulate"]) == set(KINDS)
    weights = exact["accumulate"]["scores"]  # fp32 like the weights
    assert exact["subnetwork"]["scores"] == exact["accumulate"]["masks"] == exact["accumulate"]["snapshots"] == 0
    assert exact["subnetwork"]["snapshots"] == weights
    assert exact["subnetwork"]["masks"] == weights // 4
    assert document["variants"]["dps-gradient"]["tensors"]["subnetwork"]["snapshots"] == 0
    full = document["variants"]["full"]["tensors"]["accumulate"]
    assert full["W0"] == full["scores"] == 0
    biases = exact["accumulate"]["W0"] - weights
    assert document["variants"]["dps-offloaded"]["tensors"]["accumulate"]["W0"] == biases
    assert full["gradients"] == full["trained weights"]


def test_output_names_no_host_and_no_path(output, document):
    assert os.uname().nodename not in output
    assert str(Path.cwd()) not in output
    assert document["versions"]["torch"] in {each.version for each in distributions(name="torch")}


def test_spread():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, lower=2.0, upper=4.0, count=5)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    scaling.main(
        "--size toy --batch 2 --tokens 8 --stage-steps 2 --cycles 1 --warmup 1 --entries 1000 2000 4000 --repeats 2 "
        f"--out {path}".split()
    )
    return json.loads(path.read_text())


def test_dps_on_engines_is_held_against_the_engines(scaled):
    found = {(each["variant"], each["against"], each["figure"]) for each in scaled["step_ratios"]}
    assert found == {(*pair, figure) for pair, figure in product(scaling.comparisons(scaling.ENGINES), FIGURES)}
    assert [each["figure"][:2] for each in scaled["rounds"]] == ["ac", "ac", "se", "su"]
    names = {name for engine in scaling.ENGINES for name in scaling.variants_on(engine)}
    assert all(set(each["times"]) == names for each in scaled["rounds"])
    assert [each["entries"] for each in scaled["selection"]] == [1000, 2000, 4000]
    assert all(each["seconds"]["count"] == 2 for each in scaled["selection"])


def test_what_engines_communicate_is_counted(scaled):
    traffic = {
        name: {figure: sum(by_collective.values()) for figure, by_collective in figures.items()}
        for name, figures in scaled["traffic_bytes"].items()
    }
    for figure in FIGURES:
        assert traffic["ddp-dense"][figure] == traffic["ddp-mix"][figure] == traffic["ddp-plain"][figure] > 0
    plain, dense, mix = (traffic[f"fsdp2-{method}"] for method in scaling.METHODS)
    in_file, mix_in_file = (traffic[f"fsdp2-{method}"] for method in scaling.OFFLOADED)
    assert dense["accumulate"] == dense["subnetwork"] + 4  # was any gradient not finite?
    assert dense["selecting"] > dense["accumulate"] > plain["accumulate"]  # W0 is collected beside W
    assert mix["accumulate"] == dense["accumulate"]
    # All but the pretrained biases, which are collected with the blocks.
    for figure in FIGURES:
        assert dense[figure] - in_file[figure] == mix[figure] - mix_in_file[figure] > 0
    assert in_file["subnetwork"] < 1.05 * plain["subnetwork"]
    assert mix["subnetwork"] > dense["subnetwork"]  # W_eff is collected too
