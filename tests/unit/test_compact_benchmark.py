import copy
import json
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks import compact, compact_layer, low_memory, page
from benchmarks.compact_methods import METHODS, REFERENCES, Plan
from benchmarks.compact_page import AIMS, section
from benchmarks.compact_worker import Worker
from benchmarks.engine import target_weights
from benchmarks.models import build_model
from benchmarks.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # SHiRA
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
_NAMES = [*REFERENCES, "columns", "scoring"]


class _Crew:
    def __init__(self, made):
        self._made = made

    def ask(self, name, method, *arguments):
        return getattr(self._made[name], method)(*arguments)


@contextmanager
def _in_this_process(make, names, plan):
    yield _Crew({name: make(name, plan) for name in names})


@pytest.fixture(scope="module")
def plan():
    settings = Settings(size="toy-pair", batch=2, tokens=8, optimizer="adamw-foreach", dropout=0.0, threads=1)
    return Plan(settings, density=0.1, rank=4, units=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Results of both toys; everything is computed in this process."""
    path = tmp_path_factory.mktemp("benchmark") / "compact_cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "crew_of", _in_this_process)
        tiny = "--tiny --rounds 2 --warmup 1 --threads 1 --optimizer adamw-foreach --methods columns scoring"
        compact.main([*tiny.split(), "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def document(path):
    return json.loads(path.read_text())


def test_both_models_have_every_figure(document):
    assert set(document["models"]) == {"toy-pair", "decoder-toy-pair"}
    for model in document["models"].values():
        assert list(model["held"]) == _NAMES
        assert model["groups"] == [[*REFERENCES, *model["groups"][0][3:]]]
        assert all(len(seconds) == 2 for seconds in model["seconds"][0].values())
        pairs = {(each["method"], each["against"]) for each in model["ratios"]}
        assert pairs == {pair for pair in product(_NAMES, REFERENCES) if pair[0] != pair[1]}
        assert model["held"]["columns"]["kept"] < model["held"]["lora"]["kept"]


def test_the_page_tells_what_was_aimed_at(document, path, tmp_path):
    measured = [aim for aim in AIMS if aim.method in _NAMES and aim.against in {None, *_NAMES}]
    assert path.with_suffix(".md").read_text() == section(document)
    page.main(["--results", str(path), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    # The processes of toys may not grow at all, and such growth is compared with nothing.
    fewest = len([aim for aim in measured if not aim.figure.startswith("process")])
    totals = [int(total) for total in re.findall(r"\d+ of (\d+) aims are met", text)]
    assert len(totals) == 2
    assert all(fewest <= total <= len(measured) for total in totals)
    assert "entries: " not in text
    ratio = {"method": "columns", "against": "full", "lower": 0.6, "upper": 0.8}
    model = {**document["models"]["toy-pair"], "ratios": [ratio]}
    alone = {**document, "models": {"toy-pair": model}}
    ratio["median"] = 0.7
    assert "| columns: step beside full |" not in section(alone)
    ratio["median"] = 0.8
    assert "| columns: step beside full | 0.710 | 0.800 |" in section(alone)


def test_the_page_begins_with_what_is_saved(document):
    model = copy.deepcopy(document["models"]["toy-pair"])
    model["ratios"] = [{"method": "columns-units", "against": "lora", "median": 0.875, "lower": 0.6, "upper": 0.9}]
    model["held"]["columns-units"] = {**model["held"]["columns"], "peak": 3.0, "trained": 1}
    model["held"]["lora"] |= {"peak": 4.0, "trained": 2}
    said = "take 0.88 of the step and 0.75 of the peak memory of a LoRA of rank 16**, with 0.50 of its entries"
    assert said in section({**document, "models": {"toy-pair": model}})


def test_results_of_another_machine_are_not_mixed(path, document, tmp_path):
    document = {**document, "machine": {}}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="results of another machine"):
        compact.main(["--tiny", "--out", str(other)])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_is_counted(name, plan):
    held = Worker(name, plan).hold()
    assert 0 < held.kept <= held.alive + 64 < held.peak  # numbers that take no memory of their own
    assert held.gradients > 0
    assert held.parameters <= held.peak
    assert (held.file is not None) == METHODS[name].is_compact
    if held.file is not None:
        assert held.content < held.file < 3 * held.content
        assert held.per_entry > 4


def test_what_entries_hold(plan):
    worker = Worker("entries", plan)
    held = worker.hold()
    weights = target_weights(worker.model)
    entries, trained = (sum(sizes) for sizes in zip(*((w.entries, w.parameter.numel()) for w in weights), strict=True))
    counters = 4 * len(weights)  # the optimizer's steps
    assert held.per_entry == (4 * entries + 16 * trained + counters) / entries


def test_blocks_are_the_upper_half(plan):
    worker = Worker("blocks", plan)
    chosen = {weight.name for weight in target_weights(worker.model) if weight.parameter.numel()}
    assert len(chosen) == 7
    assert all(".layer.1." in name or ".pooler." in name for name in chosen)


def test_methods_share_memory_as_far_as_it_goes():
    needs = {"full": 4, "lora": 1, "lora-fa": 1, "columns": 1, "rows": 1, "copy": 6}
    assert compact.grouped(list(needs), needs, 14) == [[*REFERENCES, "copy", "columns", "rows"]]
    assert compact.grouped(list(needs), needs, 12) == [[*REFERENCES, "copy"], [*REFERENCES, "columns", "rows"]]
    assert compact.grouped(list(REFERENCES), needs, 12) == [[*REFERENCES]]
    assert compact.grouped(list(needs), needs, 11) == [["full", "copy"], [*REFERENCES, "columns", "rows"]]
    with pytest.raises(MemoryError, match="Leave 'copy' out"):
        compact.grouped(list(needs), needs, 9)


def test_ways_to_compute_a_layer_agree():
    found, trained = compact_layer.ways(12, 10, rows=6, density=0.2, rank=2)
    x, delta = trained[:2]
    expected = {}
    for name in ("peft_dps", "plain operators", "one function", "one function, padded", "one function, turned"):
        x.grad = delta.grad = None
        with torch.no_grad():
            delta.copy_(torch.arange(30.0).view(10, 3))
        output = found[name]()
        output.square().sum().backward()
        results = {"y": output.detach(), "x": x.grad, "delta": delta.grad}
        expected = expected or results
        torch.testing.assert_close(results, expected)


def test_ways_to_compute_a_layer_are_timed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compact_layer, "SHAPES", ((12, 10),))
    few = ["--rows", "4", "--rounds", "2", "--rank", "2", "--density", "0.2", "--out", str(tmp_path / "layer.json")]
    compact_layer.main(few)
    shown = capsys.readouterr().out
    lines = shown[shown.index("| way") :].splitlines()
    assert lines[0] == "| way | 12 to 10 |"
    assert "| frozen alone | 1.000 (1.000 to 1.000) |" in lines
    assert len([line for line in lines if line]) == 11
    assert shown.strip() == compact_layer.section(json.loads((tmp_path / "layer.json").read_text())).strip()


@pytest.mark.parametrize("way", low_memory.WAYS)
def test_memory_that_is_saved_already_is_counted(way, tmp_path, monkeypatch):
    if low_memory.WAYS[way][1]:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(compact, "crew_of", _in_this_process)
    path = tmp_path / "low_memory.json"
    low_memory.main(["--tiny", "--rounds", "2", "--threads", "1", "--way", way, "--out", str(path)])
    document = json.loads(path.read_text())
    held = document["ways"][way]["held"]
    assert list(held) == list(low_memory.METHODS)
    assert held["columns-units"]["alive"] <= held["lora"]["alive"]
    page.main(["--results", str(path), "--out", str(tmp_path / "page.md")])
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith(f"| {way} |")]
    assert len(rows) == len(low_memory.METHODS)


def test_checkpoints_and_4_bits_hold_less(plan, tmp_path):
    bytes_of = {}
    for way, (checkpointing, four_bits) in low_memory.WAYS.items():
        if four_bits:
            pytest.importorskip("bitsandbytes")
            build_model(Settings(size="decoder-toy-pair")).save_pretrained(tmp_path)
        settings = replace(plan.settings, size="decoder-toy-pair", batch=8, tokens=32)
        one = replace(plan, settings=settings, checkpointing=checkpointing, four_bits=tmp_path if four_bits else None)
        bytes_of[way] = Worker("columns-units", one).hold()
    plain, checkpoints, quantized, both = bytes_of.values()
    assert checkpoints.alive < plain.alive
    assert both.alive < quantized.alive
    assert quantized.parameters < plain.parameters
    assert quantized.file is None
