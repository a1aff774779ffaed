from __future__ import annotations

import pytest

from peft_dps.compare.cli.command import main
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
    for text in ("full FT", "LoRA", "BitFit", "DPS Dense", "DPS Mix", "elsewhere", "step time"):
        assert text in shown
    assert "Proof that DPS Dense; DPS Mix engaged, at the end of their last SUBNETWORK: " in shown
    assert "each accuracy is uncertain by up to" in shown
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Proof that DPS Dense; DPS Mix engaged, at the end of their last SUBNETWORK: " in page
    assert f"Report: {output / 'report.html'}" in shown
    results = read(output / "runs.jsonl")
    full, lora, bitfit, dense, mix = results.reported
    assert [run.plan.method for run in (full, lora, bitfit, dense, mix)] == [
        "full",
        "lora",
        "bitfit",
        "dps-dense",
        "dps-mix",
    ]
    assert len({run.order for run in results.reported}) == 1
    assert set(dense.scores) == {"test", "elsewhere"}
    assert dense.trainable == mix.trainable == full.trainable > bitfit.trainable
    assert dense.frozen_moved is mix.frozen_moved is False
    assert "subnetwork 10/10" in dense.status
    assert 0 < dense.selected < full.trainable
    assert (full.selections, full.status) == ([], "")
    (timing,) = results.timings
    assert list(timing.seconds) == [run.plan.variant for run in results.reported]


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
