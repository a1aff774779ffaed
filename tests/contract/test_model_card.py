"""The model card says how the adapter was trained."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_dps import export_adapter
from peft_dps.tuner.model_card import write_section


def card(path):
    return (path / "README.md").read_text()


def rows(path):
    cells = [line.split("|")[1:3] for line in card(path).splitlines() if line.startswith("| ")]
    return {name.strip(): value.strip() for name, value in cells}


@pytest.mark.parametrize("save", [lambda model, path: model.save_pretrained(path), export_adapter], ids=["", "export"])
def test_the_card_tells_of_the_training(case, tmp_path, save):
    model = case.model(variant="mix", density=0.25, seed=3)
    case.train(model, steps=3)
    save(model, tmp_path)
    status = model.dps_status()
    told = rows(tmp_path)
    assert told["variant"] == "`mix`"
    assert told["density of the subnetwork"] == "0.25, chosen within each weight"
    assert told["length of a stage"] == "2 steps"
    assert told["targeted weights"] == f"{len(status.layers)}, of {status.entries} entries"
    assert told["optimizer steps"] == "3"
    assert told["saved in"] == "cycle 1, SUBNETWORK, step 1 of the stage"
    assert told["selected at the latest selection"].startswith(f"{status.selected} of {status.entries} entries (2")
    assert told["seed of the method"] == "3"
    assert "DPS Mix" in card(tmp_path)
    assert "import peft_dps" in card(tmp_path)
    assert card(tmp_path).startswith("---\n")
    assert "library_name: peft" in card(tmp_path)


def test_the_card_says_below_its_title_what_loading_takes(mlp, tmp_path):
    model = mlp.model(
        storage="compact", granularity="column", schedule="once", score_steps=1, units=2, train_bias=False
    )
    mlp.train(model, steps=2)
    model.save_pretrained(tmp_path)
    title, what_comes_next = [line for line in card(tmp_path).split("\n---\n", 1)[1].splitlines() if line][:2]
    assert title.startswith("# ")
    assert what_comes_next.startswith("<!-- peft_dps")
    assert "Without it they raise `KeyError: 'DPS'`" in card(tmp_path)
    assert "DPS Dense" not in card(tmp_path)  # columns that are selected once are another method
    told = rows(tmp_path)
    assert told["selected as a whole"] == "`column`"
    assert told["steps of scoring"] == "1"
    assert not {"variant", "length of a stage"} & told.keys()


@pytest.mark.parametrize("written", ["", "My words.\n", "# Mine\n\nMy words.\n", "---\ntags: [a]\n---\nMy words.\n"])
def test_the_section_finds_its_place_in_any_card(tmp_path, written):
    (tmp_path / "README.md").write_text(written)
    for section in ("one", "two"):
        write_section(section, tmp_path / "README.md")
    assert card(tmp_path).index("\ntwo\n") < card(tmp_path).find("My words.") or not written
    assert [line for line in card(tmp_path).splitlines() if line and line[0] != "<" and line != "two"] == [
        line for line in written.splitlines() if line
    ]


@pytest.mark.parametrize(
    ("fields", "before", "after"),
    [
        ({"stage_steps": 0.25, "total_steps": 48}, "0.25 of all steps", "0.25 of all steps: 12 steps"),
        ({"stage_steps": None}, "known when training begins", "10 steps"),
    ],
)
def test_the_card_tells_the_length_of_a_stage_once_it_is_known(mlp, tmp_path, fields, before, after):
    model = mlp.model(**fields)
    model.save_pretrained(tmp_path)
    assert rows(tmp_path)["length of a stage"] == before
    mlp.train(model, steps=1)
    model.save_pretrained(tmp_path)
    assert rows(tmp_path)["length of a stage"] == after


def test_saving_again_replaces_the_section_and_keeps_what_others_wrote(mlp, tmp_path):
    model = mlp.model(train_bias=False, frozen="gradient", scope="model")
    model.save_pretrained(tmp_path)
    told = rows(tmp_path)
    assert told["training"] == "none in the process that saved this"
    assert told["length of a stage"] == "2 steps"
    assert told["biases of targeted modules"] == "not trained"
    assert told["modules trained in full beside them"] == "`head`"
    assert "momentum" in told["frozen entries in SUBNETWORK"]
    (tmp_path / "README.md").write_text(card(tmp_path) + "\nMy own words, with a \\1 and a backslash.\n")
    mlp.train(model, steps=1)
    model.save_pretrained(tmp_path)
    assert card(tmp_path).count("## How it was trained") == 1
    assert "My own words, with a \\1 and a backslash." in card(tmp_path)
    assert "training" not in rows(tmp_path)
    assert rows(tmp_path)["selected at the latest selection"] == "none before the first SUBNETWORK stage"


def test_a_card_that_the_trainer_writes_anew_has_the_section_when_the_adapter_is_saved_again(bert, tmp_path):
    model = bert.model()
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none"))
    bert.train(model, steps=1)
    trainer.create_model_card(model_name="mine")
    assert "How it was trained" not in card(tmp_path)
    trainer.save_model()
    assert "# mine" in card(tmp_path)
    assert card(tmp_path).count("## How it was trained") == 1
    assert rows(tmp_path)["optimizer steps"] == "1"


def test_a_card_of_another_tuner_has_none(mlp, tmp_path):
    model = get_peft_model(mlp.base(), LoraConfig(target_modules=["fc"]))
    model.save_pretrained(tmp_path)
    assert "How it was trained" not in card(tmp_path)


def test_weights_that_were_loaded_in_the_end_are_told(mlp, tmp_path):
    model = mlp.model()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    mlp.train(model, steps=1, optimizer=optimizer)
    model.save_pretrained(tmp_path / "best")
    mlp.train(model, steps=2, optimizer=optimizer)
    model.load_adapter(tmp_path / "best", "default", is_trainable=True)  # as `load_best_model_at_end` does
    model.save_pretrained(tmp_path / "last")
    assert "weights" not in rows(tmp_path / "best")
    assert rows(tmp_path / "last")["optimizer steps"] == "3"
    assert rows(tmp_path / "last")["weights"].startswith("loaded after the last of these steps")
    mlp.train(model, steps=1, optimizer=optimizer)
    model.save_pretrained(tmp_path / "later")
    assert "weights" not in rows(tmp_path / "later")


def test_many_modules_are_not_all_named(bert, tmp_path):
    bert.model(train_remaining=True).save_pretrained(tmp_path)
    assert rows(tmp_path)["modules trained in full beside them"].endswith(" more")


def test_an_adapter_in_a_folder_of_its_own_has_a_card_there(mlp, tmp_path):
    model = mlp.model(density=0.25)
    model.add_adapter("other", mlp.config(density=0.5))
    model.save_pretrained(tmp_path)
    assert rows(tmp_path)["density of the subnetwork"].startswith("0.25")
    assert rows(tmp_path / "other")["density of the subnetwork"].startswith("0.5")
    assert "import peft_dps" in card(tmp_path / "other")


def test_a_config_saved_alone_writes_no_card(mlp, tmp_path):
    model = mlp.model()
    model.save_pretrained(tmp_path / "adapter")
    model.peft_config["default"].save_pretrained(tmp_path / "config")
    assert [path.name for path in (tmp_path / "config").iterdir()] == ["adapter_config.json"]
    assert "card" not in (tmp_path / "config" / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path / "adapter")
    assert loaded.peft_config["default"].write_card is None
