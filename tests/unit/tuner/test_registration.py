from __future__ import annotations

import base64
import copy
import enum
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn

import peft_dps
from peft_dps import DPSConfig, DPSModel, registration
from peft_dps.errors import RegistrationError
from peft_dps.tuner.config import DPSPeftType
from peft_dps.tuner.peft_interface import MINIMUM

TABLES = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def entries() -> list[object]:
    return [table["DPS"] for table in TABLES]


# --- what PEFT and transformers do with a peft type ---


def test_the_tables_are_found_by_the_string_of_a_checkpoint_and_by_the_type():
    assert entries() == [DPSConfig, DPSModel, "dps_"]
    assert [table[DPSConfig().peft_type] for table in TABLES] == entries()


def test_the_prefix_is_the_one_that_transformers_derives():
    assert PEFT_TYPE_TO_PREFIX_MAPPING["DPS"] == f"{DPSConfig().peft_type.value.lower()}_"


def test_the_peft_type_acts_like_the_string():
    peft_type = DPSConfig().peft_type
    assert peft_type == "DPS"
    assert hash(peft_type) == hash("DPS")
    assert peft_type in ("LORA", "DPS")
    assert peft_type != PeftType.LORA
    assert peft_type.value == "DPS"
    assert str(peft_type).partition(".")[-1] == "DPS"
    assert json.dumps({"peft_type": peft_type}) == '{"peft_type": "DPS"}'


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])  # noqa: S301
def test_the_peft_type_is_the_same_object_in_copies_and_pickles(copied):
    assert copied(DPSPeftType.DPS) is DPSPeftType.DPS


def test_pefts_own_enum_is_left_alone():
    assert "DPS" not in PeftType.__members__


# --- registering ---


def test_registering_again_changes_nothing():
    before = entries()
    sizes = [len(table) for table in TABLES]
    registration.register()
    assert entries() == before
    assert [len(table) for table in TABLES] == sizes


@pytest.mark.parametrize("version", ["0.20.9", "0.9.0", f"{MINIMUM}.dev0"])
def test_a_peft_that_is_too_old_is_refused_with_the_remedy(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(RegistrationError, match=rf"peft >= {MINIMUM}, found {version}.*pip install"):
        registration.register()


@pytest.mark.parametrize("version", [MINIMUM, "0.100.0", "1.0.0"])
def test_newer_pefts_are_compared_as_versions_not_as_text(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    registration.register()


def test_a_peft_with_a_tuner_of_that_name_in_its_table_is_refused_and_kept(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, DPSPeftType.DPS, LoraConfig)
    with pytest.raises(RegistrationError, match=r"already has a tuner named DPS.*without importing peft_dps"):
        registration.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DPS"] is LoraConfig


def test_a_peft_with_a_type_of_that_name_is_refused(monkeypatch):
    monkeypatch.setattr(registration, "PeftType", enum.Enum("PeftType", {"LORA": "LORA", "DPS": "DPS"}))
    with pytest.raises(RegistrationError, match=r"already has a tuner named DPS.*install a peft version without it"):
        registration.register()


def test_registration_errors_are_import_errors():
    assert issubclass(RegistrationError, ImportError)


# --- in a process of its own: each import takes seconds, so all of it is one story ---

STORY = """
import base64, copy, importlib, json, os, pickle, sys
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

checkpoint, told = os.environ["CHECKPOINT"], {}

def load():
    return PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), checkpoint)

def train():
    dps = sys.modules["peft_dps"]
    config = dps.DPSConfig(target_modules=["0"], stage_steps=2, density=0.5)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    status = model.dps_status()
    return [status.steps, status.selected, status.frozen_moved]

def attempt(action):
    try:
        action()
    except Exception as error:
        return repr(error)
    return "no error"

told["imported by peft alone"] = "peft_dps" in sys.modules
told["model without the plugin"] = attempt(load)
told["config without the plugin"] = attempt(lambda: PeftConfig.from_pretrained(checkpoint))

config = pickle.loads(base64.b64decode(os.environ["PICKLE"]))
told["imported by the pickle"] = "peft_dps" in sys.modules
first = sys.modules["peft_dps"]
told["unpickled"] = [type(config) is first.DPSConfig, config.density, sorted(config.target_modules)]
told["deepcopy of unpickled"] = copy.deepcopy(config) == config
told["registered by the pickle"] = PEFT_TYPE_TO_CONFIG_MAPPING["DPS"] is first.DPSConfig
told["model with the plugin"] = attempt(load)
told["trained"] = train()

hooks = len(_global_optimizer_pre_hooks)
for name in ("peft_dps.selection.scores", "peft_dps.tuner.registration", "peft_dps.training.hooks", "peft_dps"):
    importlib.reload(sys.modules[name])
told["hooks added by reloading"] = len(_global_optimizer_pre_hooks) - hooks

for name in [name for name in sys.modules if name.partition(".")[0] == "peft_dps"]:
    del sys.modules[name]
second = importlib.import_module("peft_dps")
told["another module"] = second is not first
told["registered anew"] = PEFT_TYPE_TO_CONFIG_MAPPING["DPS"] is second.DPSConfig
told["trained after a second import"] = train()
told["model after a second import"] = attempt(load)
print(json.dumps(told))
"""


def test_what_a_fresh_process_sees_before_and_after_the_import_a_reload_and_a_second_import(tmp_path):
    config = DPSConfig(target_modules=["0"], density=0.25)
    get_peft_model(nn.Sequential(nn.Linear(4, 3)), config).save_pretrained(str(tmp_path))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(peft_dps.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "CHECKPOINT": str(tmp_path),
        "PICKLE": base64.b64encode(pickle.dumps(config)).decode(),
    }
    done = subprocess.run([sys.executable, "-c", STORY], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        # PEFT has no entry points: without the import, a checkpoint of ours is a bare KeyError.
        "imported by peft alone": False,
        "model without the plugin": "KeyError('DPS')",
        "config without the plugin": "KeyError('DPS')",
        # A pickled config brings the plugin with it.
        "imported by the pickle": True,
        "registered by the pickle": True,
        "unpickled": [True, 0.25, ["0"]],
        "deepcopy of unpickled": True,
        "model with the plugin": "no error",
        "trained": [3, 6, False],
        "hooks added by reloading": 0,
        # After deletion from sys.modules, the second import takes over.
        "another module": True,
        "registered anew": True,
        "trained after a second import": [3, 6, False],
        "model after a second import": "no error",
    }


def test_a_model_registered_here_is_saved_under_the_plain_name(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), DPSConfig(target_modules=["0"]))
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DPS"
    assert torch.equal(
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), str(tmp_path)).base_model.model[0].weight,
        model.base_model.model[0].weight,
    )
