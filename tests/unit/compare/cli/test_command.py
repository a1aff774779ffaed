"""The command line as a user calls it, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dps.compare.__main__ import main as start
from peft_dps.compare.cli import command as module
from peft_dps.compare.cli.command import main
from peft_dps.compare.methods.table import METHODS
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import append, read
from peft_dps.compare.runs.run import Run

ROOT = Path(__file__).parents[4]


@pytest.fixture
def command(model_folder, data_files):
    """A comparison of five runs on the user's model and data."""
    return [
        *("--model", str(model_folder), "--data", str(data_files / "train.csv"), "--test"),
        *(str(data_files / "elsewhere.csv"), "--text-column", "sentence", "--label-column", "mood"),
        *("--methods", "full", 'dps-dense:{"stage_steps": 2}', "broken", "--learning-rates", "1e-2"),
        *("--seeds", "0-1", "--epochs", "2", "--validation-size", "8", "--imports", "my_methods"),
        *("--output", str(data_files / "runs.jsonl")),
    ]


@pytest.fixture
def my_methods(data_files, monkeypatch):
    """A module of the user's, in the way of the comparison."""
    (data_files / "my_methods.py").write_text(
        "from peft_dps.compare.methods.table import register_method\n\n\n"
        "@register_method('broken', 'a broken one')\n"
        "def broken(model):\n    raise RuntimeError('it is broken')\n"
    )
    monkeypatch.syspath_prepend(str(data_files))
    yield
    METHODS.pop("broken", None)
    sys.modules.pop("my_methods", None)


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on(command, data_files, my_methods, capsys):
    path = data_files / "runs.jsonl"
    search = os.pathsep.join([str(ROOT), str(data_files)])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        [sys.executable, "-m", "peft_dps.compare", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2/6"):
                process.send_signal(signal.SIGKILL)
                break
        rest = process.stdout.read()
    assert process.returncode == -signal.SIGKILL, rest
    before = path.read_bytes()
    assert 2 <= len(read(path).runs) < 6
    status = main([*command, "--jobs", "2"])
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 1, shown  # since a run failed
    assert path.read_bytes().startswith(before)
    results = read(path)
    assert len(results.runs) == 6
    failed = [run for run in results.runs.values() if run.failed]
    assert {(run.plan.method, run.error) for run in failed} == {("broken", "RuntimeError: it is broken")}
    assert len({run.order for run in results.runs.values() if run.plan.seed == 0 and not run.failed}) == 1
    for text in (
        "failed: RuntimeError: it is broken",
        "are finished already",
        "Proof that",
        "in 2 of 2 runs; with seed 0",
    ):
        assert text in shown
    report = data_files / "runs" / "report.html"
    assert f"Report: {report}" in shown
    assert "a broken one failed with seed 1: RuntimeError: it is broken" in report.read_text(encoding="utf-8")
    assert "in broken" in (data_files / "runs.jsonl.failures.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["compare"], "`tasks` must name a task"),
        (["--methods", "lorra", "--tasks", "sentiment"], "`methods` must be among full"),
        (["--file", "absent.toml"], "absent.toml"),
        (
            ["--methods", "lora", "--tasks", "sentiment", "--reference", "bitfit"],
            "among the methods, lora, got 'bitfit'",
        ),
        (["compare", "--tasks", "sentiment", "--imports", "no_such_module"], "no_such_module"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert complaint in " ".join(capsys.readouterr().out.split())


def test_where_an_error_came_from_is_shown_on_demand(tmp_path):
    with pytest.raises(OSError, match=r"absent\.toml"):
        main(["--file", str(tmp_path / "absent.toml"), "--traceback"])


def test_a_launcher_of_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--tasks", "sentiment"]) == 1
    assert "start it plainly, not by `accelerate launch`" in " ".join(capsys.readouterr().out.split())


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compare", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main(["--tasks", "sentiment"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().out


@pytest.fixture
def finished(monkeypatch, tmp_path):
    """A comparison whose runs are all in the result file."""
    source = tmp_path / "reviews.jsonl"
    for method in ("full", "lora"):
        append(Run(Plan(method, 1e-4, "cola", 0, "tiny"), method, "", ["m"], {"cola": {"m": 0.5}}), source)
    monkeypatch.setattr(module, "compare", lambda *arguments: read(source))
    return source


def test_a_comparison_leaves_its_report_beside_the_results(finished, capsys):
    assert main(["--tasks", "sentiment", "--output", str(finished)]) == 0
    shown = capsys.readouterr().out
    page = finished.parent / "reviews" / "report.html"
    assert f"Report: {page}" in shown
    assert page.is_file()


def test_a_comparison_without_a_report(finished, capsys):
    assert main(["--tasks", "sentiment", "--output", str(finished), "--no-report"]) == 0
    assert f"Results: {finished}" in capsys.readouterr().out
    assert [path.name for path in finished.parent.iterdir()] == ["reviews.jsonl"]


def test_a_report_that_cannot_be_written_leaves_the_results(finished, capsys):
    (finished.parent / "reviews").write_text("in the way")
    before = finished.read_bytes()
    assert main(["--tasks", "sentiment", "--output", str(finished)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Results: {finished}" in shown
    assert "The report cannot be written to" in shown
    assert "peft-dps report" in shown
    assert "cola, all training examples: 100 x m" in shown
    assert finished.read_bytes() == before


def test_what_the_extra_lacks_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft_dps.compare.cli.command", None)
    assert start(["compare", "--tasks", "sentiment"]) == 1
    assert "needs the extra `compare`" in capsys.readouterr().err


def test_the_program_starts_the_command_line(capsys):
    with pytest.raises(SystemExit, match="0"):
        start(["compare", "--help"])
    assert "(default: 0.01)" in capsys.readouterr().out
