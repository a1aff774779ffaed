from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from peft_dps.compare.cli.command import main
from peft_dps.compare.data.examples import DataError
from peft_dps.compare.report.csv_files import FILES, csv_files
from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.report import report_folder, write_report
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import append, read
from peft_dps.compare.runs.run import Run
from tests.synthetic_results import METHODS, write


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results") / "runs.jsonl")


@pytest.fixture(scope="module")
def report(results):
    folder = results.parent / "out"
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("COLUMNS", "180")
        assert main(["report", str(results), "--output", str(folder)]) == 0
    (folder / "terminal.txt").write_text(shown.getvalue())
    return folder


def rows(report, name):
    with (report / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what the page refers to."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.targets, self.ids, self.text, self.cells = [], [], [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object", "b")
        if tag not in self.VOID:
            self.open.append(tag)
        self.cells += tag == "td"
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data"):
                self.targets.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_the_page_needs_nothing_but_itself(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "url(" not in text
    assert "@import" not in text
    images = [target for target in page.targets if not target.startswith("#") and target not in FILES]
    assert len(images) == len(list((report / "figures").glob("*.png"))) == 18
    assert all(target.startswith("data:image/png;base64,") for target in images)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_text_from_the_result_file_is_escaped(report):
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    failure = "Houlsby adapters failed with seed 2: RuntimeError: <b>out of memory</b> | tried to allocate 2 GiB"
    assert failure in page.text
    assert r"\<b\>out of memory\</b\> \| tried" in (report / "report.md").read_text(encoding="utf-8")
    assert failure in (report / "terminal.txt").read_text()


def test_nothing_is_dropped(report):
    scores = rows(report, "scores.csv")
    assert len(scores) == (4 + 1 + 1) * len(METHODS)
    assert {row["method"] for row in scores if row["task"] == "cola"} == set(METHODS)
    told = {(row["task"], row["method"]): row for row in scores if row["in_domain"] == "1"}
    seeds = ("finished", "failed", "missing")
    assert [told["mrpc", "houlsby"][name] for name in seeds] == ["4", "1", "0"]
    assert [told["cola", "bitfit"][name] for name in seeds] == ["4", "1", "0"]
    assert [told["cola", "pfeiffer"][name] for name in seeds] == ["4", "0", "1"]
    (failed,) = [row for row in rows(report, "runs.csv") if row["error"]]
    assert (failed["method"], failed["seed"], failed["score"]) == ("houlsby", "2", "")
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "4 (1 failed)" in text
    assert "4 (1 missing)" in text
    assert "Pfeiffer adapters was not run with seed 4." in text


def test_tables_agree_with_the_runs(report):
    runs = [row for row in rows(report, "runs.csv") if (row["task"], row["domain"]) == ("movie", "nyt")]
    for row in rows(report, "scores.csv"):
        if (row["task"], row["domain"]) == ("movie", "nyt"):
            own = [float(run["score"]) for run in runs if run["method"] == row["method"]]
            assert float(row["mean"]) == pytest.approx(sum(own) / 5, abs=1e-6)
            assert float(row["low"]) < float(row["mean"]) < float(row["high"])


def test_the_same_file_gives_the_same_tables(results, report):
    experiments = experiments_of(read(results))
    again = csv_files(experiments)
    assert set(again) == set(FILES) - {"retention.csv"}
    for name, text in again.items():
        assert text == (report / name).read_text(encoding="utf-8")


def test_the_report_of_a_small_file_is_the_same_to_the_byte(tmp_path):
    source = tmp_path / "runs.jsonl"
    for method in ("full", "lora"):
        for seed in range(3):
            plan = Plan(method, 1e-4, "cola", seed, "tiny")
            append(Run(plan, method, "", ["m"], {"cola": {"m": 0.5 + 0.01 * seed}}), source)
    digests = []
    for name in "ab":
        write_report(source, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1]
    assert {name for name, _ in digests[0]} > {"report.html", "report.md", "runs.csv", "scores.csv"}


def test_files_of_an_earlier_report_are_gone(tmp_path):
    source, output = tmp_path / "runs.jsonl", tmp_path / "out"
    append(Run(Plan("full", 1e-4, "cola", 0, "tiny"), "full", "", ["m"], {"cola": {"m": 0.5}}), source)
    (output / "figures").mkdir(parents=True)
    for name in ("retention.csv", "figures/cola-9-seeds.png", "mine.csv"):
        (output / name).touch()
    write_report(source, output)
    assert not (output / "retention.csv").exists()
    assert not (output / "figures" / "cola-9-seeds.png").exists()
    assert (output / "mine.csv").exists()


def test_figures_are_pictures(report):
    for path in (report / "figures").glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 20  # something is drawn


def test_markdown_refers_to_figures_that_are_there(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    links = [line.rpartition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(links) == 18
    assert all((report / link).is_file() for link in links)


def test_a_file_cut_in_the_middle_of_a_line_is_reported(results, tmp_path):
    whole = results.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "runs.jsonl"
    cut.write_bytes(b"".join([*whole[:2], whole[5]])[:-100])
    (section,) = write_report(cut, tmp_path / "out").sections
    assert "full FT, no dropout" not in str(section.tables)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Lines of runs.jsonl that hold no record were left out: 3." in text
    assert len({row["seed"] for row in rows(tmp_path / "out", "runs.csv")}) == 2


def test_failures_alone_give_a_report(tmp_path):
    source = tmp_path / "runs.jsonl"
    append(Run(Plan("full", 1e-4, "cola", 0, "tiny"), "full", "OSError: no space left"), source)
    (section,) = write_report(source, tmp_path / "out").sections
    assert "full failed with seed 0: OSError: no space left" in section.checks
    assert section.pictures == []


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl' does not exist"):
        write_report(tmp_path / "none.jsonl", tmp_path)


def test_the_command_line_makes_a_report(tmp_path, capsys):
    source = tmp_path / "runs.jsonl"
    append(Run(Plan("full", 1e-4, "cola", 0, "tiny"), "full", "", ["m"], {"cola": {"m": 0.5}}), source)
    assert main(["report", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "cola, all training examples: 100 x m" in shown
    assert "Nothing was compared with full." in shown
    assert (tmp_path / "runs" / "report.html").is_file()
    assert main(["report", str(tmp_path / "none.jsonl")]) == 1
    assert "does not exist" in " ".join(capsys.readouterr().out.split())


def test_a_file_without_runs_is_named(tmp_path):
    source = tmp_path / "runs.jsonl"
    append(Run(Plan("full", 1e-4, "cola", 0, "tiny", phase="tune")), source)
    with pytest.raises(DataError, match="only 1 trial runs"):
        write_report(source, tmp_path)


def test_several_files_make_one_report(tmp_path, capsys):
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for source, methods in zip(sources, (("full", "lora"), ("full", "bitfit")), strict=True):
        for method in methods:
            append(Run(Plan(method, 1e-4, "cola", 0, "tiny"), method, "", ["m"], {"cola": {"m": 0.5}}), source)
    sources[1].write_bytes(sources[1].read_bytes() + b"{")
    assert main(["report", *map(str, sources)]) == 0
    folder = tmp_path / "report"
    assert [row["method"] for row in rows(folder, "runs.csv")] == ["full", "lora", "bitfit"]
    text = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).text)
    assert "a.jsonl (SHA-256" in text
    assert "and b.jsonl (SHA-256" in text
    assert "Lines of b.jsonl that hold no record were left out: 3." in text
    assert "1 runs are in more than one of the files; each counts once." in text


def test_another_reference(tmp_path, capsys):
    source = tmp_path / "runs.jsonl"
    scores = {"full": 0.5, "lora": 0.6, 'dps-dense:{"density": 0.3, "seed": 1}': 0.8}
    for seed in (0, 1):
        for variant, score in scores.items():
            method, _, options = variant.partition(":")
            plan = Plan(method, 1e-4, "cola", seed, "tiny", options=json.loads(options or "{}"))
            append(Run(plan, method, "", ["m"], {"cola": {"m": score + seed / 10}}), source)
    arguments = ["report", str(source), "--reference"]
    assert main([*arguments, 'dps-dense:{"seed": 1, "density": 0.3}']) == 0
    found = {row["title"]: row["difference"] for row in rows(tmp_path / "runs", "scores.csv")}
    assert found == {"dps-dense": "", "full": "-0.300000", "lora": "-0.200000"}
    assert next(iter(found)) == "dps-dense"
    assert "vs dps-dense" in (tmp_path / "runs" / "report.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main([*arguments, "bitfit"]) == 1
    assert "full, lora, got 'bitfit'" in " ".join(capsys.readouterr().out.split())


def test_the_folder_of_a_report_is_no_result_file(tmp_path):
    assert report_folder([tmp_path / "runs.v2.jsonl"]) == tmp_path / "runs.v2"
    assert report_folder([tmp_path / "runs"]) == tmp_path / "runs-report"
    assert report_folder([tmp_path / "a.jsonl", tmp_path / "deep" / "b.jsonl"]) == tmp_path / "report"


def test_a_reference_without_a_run_is_refused(tmp_path):
    source = tmp_path / "runs.jsonl"
    append(Run(Plan("lora", 1e-4, "cola", 0, "tiny"), "lora", "", ["m"], {"cola": {"m": 0.5}}), source)
    with pytest.raises(ValueError, match="method of the report, lora, got 'full'"):
        write_report(source, tmp_path / "report", "full")
