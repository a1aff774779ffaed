from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from peft_dps.compare.__main__ import main

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "a", "the", "film", "plot"]


@pytest.fixture
def model_folder(tmp_path):
    """A tiny model with random weights and a tokenizer of ten words."""
    folder = tmp_path / "model"
    folder.mkdir()
    words = folder / "words.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(words)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=15,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data_files(tmp_path):
    rows = [f"the {WORDS[i % 6]} {WORDS[6 + i % 4]} {i},{'up' if i % 6 < 3 else 'down'}" for i in range(60)]
    for name in ("train", "elsewhere"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["sentence,mood", *rows]))
    return tmp_path


@pytest.mark.slow
def test_demo_on_the_users_model_and_data(model_folder, data_files, tmp_path, capsys):
    output = tmp_path / "out"
    status = main(
        [
            "demo",
            *("--model", str(model_folder)),
            *("--data", str(data_files / "train.csv")),
            *("--other", f"elsewhere={data_files / 'elsewhere.csv'}"),
            *("--text-column", "sentence"),
            *("--label-column", "mood"),
            *("--epochs", "8"),
            *("--output", str(output)),
        ]
    )
    shown = capsys.readouterr().out
    assert status == 0, shown
    for text in (
        "full fine-tuning",
        "DPS Dense",
        "DPS Mix",
        "elsewhere",
        "Proof that DPS Dense engaged",
    ):
        assert text in shown
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    full, dense, mix = (json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines())
    assert [run["method"] for run in (full, dense, mix)] == ["full", "dps-dense", "dps-mix"]
    assert set(dense["scores"]) == {"train", "elsewhere"}
    assert dense["trainable"] == mix["trainable"] == full["trainable"]
    assert set(dense["stages"]) == {"accumulate", "subnetwork"}
    assert dense["frozen_moved"] is mix["frozen_moved"] is False
    assert "subnetwork 1/1" in dense["status"]
    assert sum(dense["selected"].values()) > 0
    assert full["stages"] == []
    assert full["file_size"] > 0
    assert dense["peak_memory"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--other", "elsewhere"], "`--other` must be NAME=DATA"),
        (["--other", "a=b.csv"], "`--other` goes with `--data`"),
        (["--model", "m", "--data", "missing.csv"], "missing.csv"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint, capsys):
    assert main(["demo", *arguments]) == 1
    assert complaint in capsys.readouterr().out
