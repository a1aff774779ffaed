from __future__ import annotations

import argparse

import pytest

from peft_dps.compare.cli.command import main
from peft_dps.compare.cli.demo import METHODS, demo_comparison
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.runs.results import read


@pytest.mark.slow
def test_demo_on_the_users_model_and_data(model_folder, data_files, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [
        "demo",
        *("--model", str(model_folder)),
        *("--data", str(data_files / "train.csv")),
        *("--other", f"elsewhere={data_files / 'elsewhere.csv'}"),
        *("--text-column", "sentence"),
        *("--label-column", "mood"),
        *("--epochs", "8"),
        *("--output", str(output)),
    ]
    status = main(arguments)
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 0, shown
    for text in ("full FT", "DPS columns", "random columns", "DPS Dense", "LoRA", "elsewhere", "1.00 x", "file"):
        assert text in shown
    proofs = [f"Proof that {method} engaged" for method in ("DPS columns", "random columns", "DPS Dense")]
    assert all(text in shown for text in proofs)
    assert "One seed cannot tell which method is more accurate. Results: " in shown
    assert "each accuracy is uncertain by up to" in shown
    page = (output / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in proofs)
    assert f"Report: {output / 'report.html'}" in shown
    results = read(output / "runs.jsonl")
    assert [choice.method for choice in METHODS] == ["full", "dps-columns", "random-columns", "dps-dense", "lora"]
    runs = {run.plan.method: run for run in results.reported}  # two at a time end in any order
    full, columns, drawn, dense, lora = (runs[choice.method] for choice in METHODS)
    assert len({run.order for run in results.reported}) == 1
    assert set(dense.scores) == {"test", "elsewhere"}
    assert dense.trainable == full.trainable > lora.trainable > 0
    assert columns.trainable == drawn.trainable < full.trainable
    assert dense.frozen_moved is columns.frozen_moved is drawn.frozen_moved is False
    assert columns.file_size < full.file_size
    assert "subnetwork 10/10" in dense.status
    assert 0 < dense.selected < full.trainable
    assert (full.selections, full.status) == ([], "")
    (timing,) = results.timings
    assert list(timing.seconds) == [runs[choice.method].plan.variant for choice in METHODS]


def test_the_embedded_demo_asks_what_is_kept(tmp_path):
    options = argparse.Namespace(model=None, train_size=None, test_size=250, epochs=3, learning_rate=None, seed=0)
    options.output, options.cache = tmp_path, None
    comparison = demo_comparison(options, None)
    comparison.check()
    assert (comparison.tasks, comparison.probes) == (("sentiment",), ("articles",))
    options.model = "mine"
    assert demo_comparison(options, OwnData("mine.csv")).probes == ()  # nothing is fetched


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "mine.csv", "--other", "elsewhere"], "`--other` must be NAME=DATA"),
        (["--other", "a=b.csv"], "`--other` goes with `--data`"),
        (["--model", "missing", "--data", "missing.csv"], "`model` 'missing' cannot be loaded"),
        (["--data", "missing.csv", "--epochs", "0"], "`epochs` must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint, capsys, tmp_path):
    assert main(["demo", "--output", str(tmp_path), *arguments]) == 1
    assert complaint in capsys.readouterr().out
