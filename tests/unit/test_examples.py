"""Each example runs as a user would run it, and its output shows that DPS engaged."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests import needs
from tests.local_models import ENCODER, write_models, write_tables

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "plain_loop.py": [
        "step 10, cycle 1, accumulate 10/10, scoring 17408 entries, last selected none yet",
        "step 20, cycle 1, subnetwork 10/10, selected 70.0%",
        "step 30, cycle 2, accumulate 10/10",
        "step 40, cycle 2, subnetwork 10/10, selected 70.0% of 17408 entries, frozen entries unmoved",
        "engaged: True, frozen entries moved: False",
        "BertForSequenceClassification",
    ],
    "trainer.py": [
        "step 10: cycle 1, accumulate, selected None",
        "step 20: cycle 1, subnetwork, selected 0.70",
        "step 30: cycle 2, accumulate",
        "step 40: cycle 2, subnetwork",
        "step 40, cycle 2, subnetwork 10/10",
    ],
    "trainer_resume.py": [
        "interrupted at DPS adapter 'default': step 18, cycle 1, subnetwork 8/10, selected 70.0%",
        "resumed, ended at DPS adapter 'default': step 40, cycle 2, subnetwork 10/10, selected 70.0%",
        "frozen entries unmoved",
        "as if never interrupted, bit for bit: True",
    ],
    "own_score.py": ["subnetwork 10/10, selected 70.", "the loss falls: True"],
    "four_bits_to_lora.py": [
        "step 12, cycle 1, subnetwork 9, selected 5.6%",
        "the loss falls: True",
        "resumed after step 2, bit for bit: True",
        "resumed after step 6, bit for bit: True",
        "a LoRA of rank 4",
        "served without peft_dps: True, largest difference below 1e-5: True",
    ],
    "two_tasks.py": [
        "DPS adapter 'A': step 120",
        "DPS adapter 'B': step 120",
        "pretrained",
        "A + B",
        "in its weaker task the sum is ahead of each adapter: True",
    ],
    "fsdp2.py": [],  # only by torchrun, below
    "accelerate_loop.py": ["step 80, cycle 2, subnetwork 20/20, selected 70.0%", "loaded DPS"],
    "texts.py": [],  # what the others import
}
ON_TWO_PROCESSES = {
    "fsdp2.py": [
        "step 40, cycle 2, subnetwork 10/10, selected 70.0% of 17408 entries",
        "frozen entries unmoved",
        "loaded DPS",
    ],
    "accelerate_loop.py": ["step 48, cycle 2, subnetwork 12/12, selected 70.0%", "loaded DPS"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


def test_no_example_is_forgotten():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[needs.resumed_epochs] if name == "trainer_resume.py" else [])
        for name in sorted(EXPECTED)
        if EXPECTED[name]
    ],
)
def test_example_runs_and_engages(name, tmp_path):
    run_example([], name, EXPECTED[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[needs.fsdp2] if name == "fsdp2.py" else []) for name in sorted(ON_TWO_PROCESSES)],
)
def test_example_runs_on_two_processes(name, tmp_path):
    run_example(TORCHRUN, name, ON_TWO_PROCESSES[name], tmp_path, ACCELERATE_USE_CPU="true")


@pytest.fixture
def _in_a_folder(monkeypatch, tmp_path):
    """Run there, and see what lies beside an example, as Python does with a program."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.modules.pop("texts", None)


@pytest.mark.usefixtures("_in_a_folder")
@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"texts.py"}))
def test_an_example_says_what_it_takes(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--data" in shown or "takes no data: " in " ".join(shown.split())


@pytest.mark.usefixtures("_in_a_folder")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("arguments", [["trainer.py", "--columns", "4", "--output", "adapter"], ["plain_loop.py"]])
def test_an_example_trains_on_a_table(arguments, monkeypatch, tmp_path, capsys):
    write_models(tmp_path)
    write_tables(tmp_path)
    monkeypatch.setattr(sys, "argv", [*arguments, "--model", ENCODER, "--data", "reviews.csv"])
    runpy.run_path(str(ROOT / "examples" / arguments[0]), run_name="__main__")
    shown = capsys.readouterr().out
    assert "96 texts of 7 tokens, classes 0, 1" in shown
    assert "frozen entries unmoved" in shown
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() == ("--output" in arguments)


@pytest.mark.usefixtures("_in_a_folder")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "reviews.csv"], "--model and --data go together"),
        (["--model", ENCODER, "--data", "texts.csv"], "the columns text and label, got text"),
        (["--model", ENCODER, "--data", "one.csv"], "two classes or more, got a"),
        (["--model", ENCODER, "--data", "gap.csv"], "a text and a label in each row, not in 2"),
    ],
)
def test_an_example_says_what_is_wrong_with_a_table(arguments, complaint, monkeypatch, tmp_path):
    write_tables(tmp_path)
    (tmp_path / "one.csv").write_text("text,label\ngood,a\nbad,a\n")
    (tmp_path / "gap.csv").write_text("text,label\ngood,a\nbad\n")
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", *arguments])
    with pytest.raises(SystemExit, match=complaint):
        runpy.run_path(str(ROOT / "examples" / "plain_loop.py"), run_name="__main__")


@pytest.mark.usefixtures("_in_a_folder")
def test_classes_are_in_order_and_have_their_names(monkeypatch, tmp_path):
    write_models(tmp_path)
    rows = "".join(f"a text,{label}\n" for label in (10, 2, 0, 2))
    (tmp_path / "t.csv").write_text("text,label\n" + rows, encoding="utf-8-sig")
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("texts")
    texts = module.load(module.make_parser("").parse_args(["--model", ENCODER, "--data", "t.csv"]))
    assert [example["labels"] for example in texts.data] == [2, 1, 0, 1]
    assert texts.base().config.id2label == {0: "0", 1: "2", 2: "10"}


def run_example(launcher, name, expected, tmp_path, **variables):
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    run = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples" / name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    position = 0
    for promised in expected:
        position = run.stdout.find(promised, position)
        assert position >= 0, f"{promised!r} not printed, but:\n{run.stdout}"
    assert not list(tmp_path.iterdir())
