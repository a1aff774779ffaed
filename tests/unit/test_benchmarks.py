import copy
import json
import multiprocessing
import os
from dataclasses import replace
from importlib.metadata import distributions
from itertools import product
from pathlib import Path

import pytest

from benchmarks import crew, device, page, scaling, suite
from benchmarks.archive import Archive
from benchmarks.cases import Case, grouped
from benchmarks.device_methods import FULL, METHODS
from benchmarks.footprint import ACTIVATIONS
from benchmarks.memory import KINDS
from benchmarks.ratio import Spread, target
from benchmarks.rounds import FIGURES
from benchmarks.settings import Settings
from benchmarks.variant import VARIANTS
from tests import needs

pytestmark = pytest.mark.slow  # it starts a process for each variant
_TINY = "--batch 2 --tokens 8 --stage-steps 2 --cycles 2 --warmup 1 --threads 1 --optimizer adamw-foreach"
_LINEAR = ["lora", "dps-exact", "dps-gradient"]
COMPACT = ("columns", "columns-units", "rows")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Results of an encoder, loading included, and of a decoder whose linear layers are trained."""
    path = tmp_path_factory.mktemp("benchmark") / "suite_cpu.json"
    once = f"{_TINY} --out {path} --batches --lengths --densities"
    multiprocessing.set_forkserver_preload(["benchmarks.worker"])  # or each process imports for ten seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "START", "forkserver")
        suite.main(f"{once} --models toy --methods mix-remaining --load-models toy --load-rounds 1".split())
        suite.main(f"{once} --models decoder-toy --trained linear --methods {' '.join(_LINEAR)}".split())
    return path


@pytest.fixture(scope="module")
def document(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def found(document):
    """Per case and part, what was found."""
    cases = document["cases"].items()
    return {(name, part): value["found"] for name, case in cases for part, value in case["parts"].items()}


ENCODER = "toy batch=2 tokens=8 optimizer=adamw-foreach"
DECODER = "decoder-toy linear batch=2 tokens=8 optimizer=adamw-foreach"


def test_every_case_has_every_part_that_was_asked_for(found):
    assert set(found) == {*product([ENCODER], suite.PARTS), *product([DECODER], ("memory", "steps"))}


def test_every_comparison_has_every_figure(found):
    for case, (reference, others) in {ENCODER: ("full", ["mix-remaining"]), DECODER: ("full-linear", _LINEAR)}.items():
        steps = found[case, "steps"]
        assert steps["groups"] == [[reference, *others]]
        names = [(each["variant"], each["against"], each["figure"]) for each in steps["ratios"]]
        assert names == [(name, reference, figure) for name, figure in product(others, FIGURES)]
        counts = {"accumulate": 3, "selecting": 2, "subnetwork": 2}
        for ratio in steps["ratios"]:
            for reading in ("step", "own", "cpu"):
                assert ratio[reading]["lower"] <= ratio[reading]["median"] <= ratio[reading]["upper"]
                assert ratio[reading]["count"] == counts[ratio["figure"]]


def test_dps_took_place(found):
    for case in (ENCODER, DECODER):
        [run] = found[case, "steps"]["runs"]
        for name, variant in run.items():
            if VARIANTS[name].method is None:
                assert variant["selected_fraction"] is None
            else:
                assert variant["selected_fraction"] == pytest.approx(0.7, abs=0.01)
                # With "gradient" the momentum of ACCUMULATE moves frozen entries on.
                assert variant["frozen_moved"] is (name == "dps-gradient")


def test_variants_train_the_same_entries_as_full_fine_tuning(found):
    for case in (ENCODER, DECODER):
        [run] = found[case, "steps"]["runs"]
        entries = {name: variant["trained_entries"] for name, variant in run.items()}
        assert len({count for name, count in entries.items() if name != "lora"}) == 1
        assert entries.get("lora", 0) < max(entries.values())


def test_memory_is_counted_by_kind(found):
    footprints = found[DECODER, "memory"]
    exact, full = footprints["dps-exact"], footprints["full-linear"]["kinds"]["accumulate"]
    weights, base = exact["kinds"]["accumulate"]["scores"], exact["kinds"]["accumulate"]["W0"]
    assert set(exact["kinds"]) == set(exact["peaks"]) == set(FIGURES)
    assert set(exact["kinds"]["accumulate"]) == {*KINDS, ACTIVATIONS}
    assert exact["kinds"]["accumulate"]["snapshots"] == exact["kinds"]["subnetwork"]["scores"] == 0
    assert 0 < exact["kinds"]["subnetwork"]["snapshots"] <= weights
    assert footprints["dps-gradient"]["kinds"]["subnetwork"]["snapshots"] < weights / 100
    assert full["W0"] == full["scores"] == 0
    assert full["gradients"] == full["trained weights"] == base
    assert full[ACTIVATIONS] == exact["kinds"]["accumulate"][ACTIVATIONS] > 0
    plain = footprints["full-linear"]["peaks"]["accumulate"]
    assert all(footprint["process"] > footprint["peak"] / 2 for footprint in footprints.values())
    once = 1 << 15  # tables and buffers of a process, which a larger model would not notice
    assert plain < exact["peaks"]["accumulate"] <= plain + base + weights + once
    assert exact["peak"] == max(exact["peaks"].values())  # the selection's histograms are larger than a toy


def test_loading_is_held_against_loading_a_whole_model(found):
    load = found[ENCODER, "load"]
    assert [each["variant"] for each in load["ratios"]] == ["mix-remaining"]
    for ratio in load["ratios"]:
        assert ratio["load_with_base"]["median"] > ratio["load"]["median"] > 0
    assert all(set(run) > {"full"} and run["full"][0]["base"] == 0 for run in load["runs"])


def test_output_names_no_host_and_no_path(path, document):
    output = path.read_text()
    assert os.uname().nodename not in output
    assert str(Path.cwd()) not in output
    part = document["cases"][ENCODER]["parts"]["steps"]
    assert part["versions"]["torch"] in {each.version for each in distributions(name="torch")}


def test_results_of_another_machine_are_not_mixed(path, tmp_path):
    other = json.loads(path.read_text())
    other["machine"]["cores"] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="results of another machine"):
        Archive(tmp_path / "other.json", "cpu")


def test_the_page_shows_every_model_and_the_sweep(document, tmp_path):
    document = copy.deepcopy(document)
    swept = document["cases"]["toy batch=4"] = copy.deepcopy(document["cases"][ENCODER])
    swept["swept"] = "batch"
    for part in swept["parts"].values():
        part["settings"]["batch"] = 4
    (tmp_path / "suite_cpu.json").write_text(json.dumps(document))
    page.main(["--results", str(tmp_path / "suite_cpu.json"), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "| toy, 2 x 8 | DPS Mix |" in text
    assert "| decoder-toy, linear layers, 2 x 8 | DPS Dense |" in text
    assert f"| batch size, {ENCODER} | 4 |" in text
    assert "| density, " not in text
    named = {line.split("](images/")[1].split(")")[0] for line in text.splitlines() if line.startswith("![")}
    assert named == {file.name for file in (tmp_path / "images").iterdir()}
    assert named == {"suite_cpu_memory.png", "suite_cpu_sweep_batch.png"}


def test_the_committed_page_is_what_the_results_say():
    made = page.make_page({file.stem: json.loads(file.read_text()) for file in page.result_files()})
    written = (page.ROOT / "docs" / "benchmarks.md").read_text()
    assert written == made.text, "docs/benchmarks.md is out of date: run `python -m benchmarks.page`"
    assert all((page.ROOT / "docs" / "images" / name).exists() for name in made.images)


def test_variants_share_memory_as_far_as_it_goes():
    case = Case(Settings(size="toy"), methods=("lora", "dps-remaining", "mix-remaining"))
    needs = {"full": 4, "lora": 1, "dps-remaining": 6, "mix-remaining": 6}
    assert grouped(case, needs, 17) == [["full", "lora", "dps-remaining", "mix-remaining"]]
    assert grouped(case, needs, 11) == [["full", "lora", "dps-remaining"], ["full", "mix-remaining"]]
    with pytest.raises(MemoryError, match="'full' and 'dps-remaining' need"):
        grouped(case, needs, 9)


def test_cases_are_named_by_what_differs_from_the_default():
    settings = Settings(size="small", cycles=3)
    assert Case(settings).name == "small"
    assert Case(replace(settings, density=0.1), "linear").name == "small linear density=0.1"


def test_targets():
    assert target("dps-remaining", "accumulate") == target("ddp-dense", "accumulate") == 1.02
    assert target("mix-exact", "memory") == 1.45
    assert target("lora", "accumulate") is None


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


@needs.fsdp2
def test_dps_on_engines_is_held_against_the_engines(scaled):
    found = {(each["variant"], each["against"], each["figure"]) for each in scaled["step_ratios"]}
    assert found == {(*pair, figure) for pair, figure in product(scaling.comparisons(scaling.ENGINES), FIGURES)}
    assert [each["figure"][:2] for each in scaled["rounds"]] == ["ac", "ac", "se", "su"]
    names = {name for engine in scaling.ENGINES for name in scaling.variants_on(engine)}
    assert all(set(each["times"]) == names for each in scaled["rounds"])
    assert [each["entries"] for each in scaled["selection"]] == [1000, 2000, 4000]
    assert all(each["seconds"]["count"] == 2 for each in scaled["selection"])


@needs.fsdp2
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


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # SHiRA
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events at the end of each cycle:UserWarning")
def test_methods_on_a_device(tmp_path):
    out = tmp_path / "device.json"
    tiny = "--device cpu --models decoder-toy --batch 2 --tokens 8 --stage-steps 3 --cycles 2 --profile dps"
    device.main([*tiny.split(), "--out", str(out)])
    found = json.loads(out.read_text())["models"]["decoder-toy"]
    assert set(found) == set(METHODS)
    for name, method in METHODS.items():
        assert "error" not in found[name]
        assert set(found[name]["figures"]) == (set(FIGURES) if method.stages else {"step"})
        selects = True if method.stages or name in COMPACT else False if name == "scoring" else None
        assert (found[name]["engaged"], found[name]["frozen_moved"]) == (selects, None if selects is None else False)
    linear = {
        found[name]["trained_entries"]
        for name in METHODS
        if name not in (FULL, "lora", "lora-fa", "shira", "scoring", *COMPACT)
    }
    assert len(linear) == 1
    assert found["shira"]["trained_entries"] == pytest.approx(0.05 * linear.pop(), rel=0.5)  # one rank for all layers
    table = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in METHODS)
    assert "selecting" in (tmp_path / "device_kernels.txt").read_text()
