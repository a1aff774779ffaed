"""What DPS leans on in PEFT, point by point, so that a new version of PEFT fails here, where it can be read.

The points are listed in peft_dps/tuner/peft_interface.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_dps import DPSConfig, DPSLayer, DPSModel
from peft_dps.errors import ConfigError, RegistrationError
from peft_dps.tuner import peft_interface
from peft_dps.tuner.peft_interface import REPLACED, BaseTuner, BaseTunerLayer, PeftConfig
from tests.contract.conftest import Case

OURS = {PeftConfig: DPSConfig, BaseTuner: DPSModel, BaseTunerLayer: DPSLayer}
METHODS = [(base, name) for base, names in REPLACED.items() for name in names]


def ids(value: Any) -> str:
    return getattr(value, "__name__", value)


# --- the list ---


def test_the_list_names_all_that_is_replaced():
    fields = {"prefix", "tuner_layer_cls", "target_module_mapping", "adapter_layer_names", "other_param_names"}
    for base, ours in OURS.items():
        mine = [each for each in ours.__mro__ if each.__module__.startswith("peft_dps.")]
        own = {name for each in mine for name in vars(each) if hasattr(base, name) and not name.startswith("__")}
        own -= {*fields, *inspect.get_annotations(base), *dir(nn.Module), "_abc_impl"}
        assert own == set(REPLACED[base])


def test_a_peft_that_does_not_call_a_method_any_more_is_refused_by_its_name(monkeypatch):
    monkeypatch.setitem(REPLACED, BaseTuner, ("inject_adapter", "_prepare_everything"))
    with pytest.raises(RegistrationError, match=r"no longer calls BaseTuner\._prepare_everything.*pip install peft=="):
        peft_interface.require_peft()


@pytest.mark.parametrize(("base", "name"), METHODS, ids=ids)
def test_a_replaced_method_takes_what_peft_passes(base, name):
    theirs, own = inspect.getattr_static(base, name), inspect.getattr_static(OURS[base], name)
    assert type(theirs) is type(own)
    if isinstance(theirs, property):
        return
    asked, given = (inspect.signature(getattr(cls, name)).parameters for cls in (OURS[base], base))
    takes_more = {each.kind for each in asked.values()} & {inspect.Parameter.VAR_KEYWORD}
    named = [each for each in given.values() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    missing = [each.name for each in named if each.name not in asked]
    assert takes_more or not missing
    common = [each.name for each in named if each.name in asked]
    assert [each for each in asked if each in common] == common


# --- when PEFT calls what is replaced, and what it finds by name ---

Calls = list[str]


def save(model: PeftModel, case: Case, folder: Any) -> None:
    model.save_pretrained(folder)


def load(model: PeftModel, case: Case, folder: Any) -> None:
    model.save_pretrained(folder)
    PeftModel.from_pretrained(case.base(), folder, low_cpu_mem_usage=True)


def merge(model: PeftModel, case: Case, folder: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


OPERATIONS: dict[str, Callable[[PeftModel, Case, Any], object]] = {
    "get_peft_model": lambda model, case, folder: case.model(),
    "save_pretrained": save,
    "from_pretrained": load,
    "merge_adapter": merge,
    "merge_and_unload": lambda model, case, folder: model.merge_and_unload(),
    "unload": lambda model, case, folder: model.unload(),
    "convert_to_lora": lambda model, case, folder: convert_to_lora(case.model(train_bias=False), rank=2),
    "forward": lambda model, case, folder: case.output(model),
}
POINTS = {
    (DPSModel, "inject_adapter"): "get_peft_model",
    (DPSModel, "_prepare_model"): "get_peft_model",
    (DPSModel, "_check_new_adapter_config"): "get_peft_model",
    (DPSModel, "_check_tied_modules"): "get_peft_model",
    (DPSModel, "_check_target_module_exists"): "get_peft_model",
    (DPSModel, "_create_and_replace"): "get_peft_model",
    (DPSModel, "_cast_adapter_dtype"): "get_peft_model",
    (DPSModel, "_get_adapter_state_dict"): "save_pretrained",
    (DPSConfig, "save_pretrained"): "save_pretrained",
    (DPSConfig, "from_pretrained"): "from_pretrained",
    (DPSModel, "_remap_adapter_state_dict_for_load"): "from_pretrained",
    (DPSLayer, "_move_adapter_to_device_of_base_layer"): "from_pretrained",
    (DPSLayer, "merge"): "merge_adapter",
    (DPSLayer, "unmerge"): "merge_adapter",
    (DPSModel, "_unload_and_optionally_merge"): "merge_and_unload",
    (DPSModel, "_check_merge_allowed"): "merge_and_unload",
    (DPSModel, "_replace_module"): "unload",
    (DPSLayer, "unload_and_optionally_merge_module"): "unload",
    (DPSLayer, "supports_lora_conversion"): "convert_to_lora",
    (DPSLayer, "get_delta_weight"): "convert_to_lora",
    (DPSModel, "_enable_peft_forward_hooks"): "forward",
}


def record(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, calls: Calls) -> None:
    """Note the name of the file that calls a method."""
    original = inspect.getattr_static(cls, name)
    function = getattr(original, "__func__", original)

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.stack(context=0)[1].frame.f_globals["__name__"])
        return function(*args, **kwargs)

    wrapper = type(original) if isinstance(original, (classmethod, staticmethod)) else lambda it: it
    monkeypatch.setattr(cls, name, wrapper(noting))


@pytest.mark.parametrize(("cls", "name"), POINTS, ids=ids)
def test_peft_calls_what_is_replaced(mlp, tmp_path, monkeypatch, cls, name):
    model, calls = mlp.model(init_weights=False), Calls()
    record(monkeypatch, cls, name, calls)
    OPERATIONS[POINTS[cls, name]](model, mlp, tmp_path)
    assert [caller for caller in calls if caller.partition(".")[0] in ("peft", "contextlib")], calls


def test_every_replaced_method_has_an_operation_in_which_peft_calls_it():
    of_users = {(DPSModel, "merge_adapter"), (DPSLayer, "weight"), (DPSLayer, "bias")}
    assert {(OURS[base], name) for base, name in METHODS} - POINTS.keys() == of_users


def test_weights_are_asked_for_before_the_configuration_is_written(mlp, tmp_path, monkeypatch):
    order = Calls()
    for cls, name in ((DPSModel, "_get_adapter_state_dict"), (DPSConfig, "save_pretrained")):
        original = inspect.getattr_static(cls, name)
        function = getattr(original, "__func__", original)

        def noting(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            order.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(cls, name, classmethod(noting) if isinstance(original, classmethod) else noting)
    mlp.model().save_pretrained(tmp_path)
    assert order == ["_get_adapter_state_dict", "save_pretrained"]


def test_adapter_names_reach_the_tuner(mlp):
    with pytest.raises(ConfigError, match="adapter_names"):
        mlp.model()(mlp.inputs, adapter_names=["default"] * len(mlp.inputs))


def test_layers_of_single_parameters_are_found_by_the_name_of_their_class():
    assert "ParamWrapper" in inspect.getsource(inspect.getmodule(BaseTuner))


def test_all_linear_finds_our_layers_by_the_name_of_their_class(gpt2):
    model = gpt2.model()
    model.add_adapter("other", gpt2.config())
    assert model.peft_config["other"].target_modules == model.peft_config["default"].target_modules


# --- what is read ---


def test_the_tables_take_a_string_for_a_type():
    tables = (
        peft_interface.PEFT_TYPE_TO_CONFIG_MAPPING,
        peft_interface.PEFT_TYPE_TO_TUNER_MAPPING,
        peft_interface.PEFT_TYPE_TO_PREFIX_MAPPING,
    )
    assert [table["LORA"] for table in tables] == [LoraConfig, peft.LoraModel, "lora_"]


def test_a_tuner_tells_its_model_and_its_adapters(mlp):
    model = get_peft_model(mlp.base(), LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    tuner = model.base_model
    assert isinstance(tuner, BaseTuner)
    assert tuner.model is model.get_base_model()
    assert (list(tuner.peft_config), tuner.active_adapters) == (["default"], ["default"])
    tuner.delete_adapter("default")
    assert not tuner.peft_config


def test_a_layer_tells_what_is_active_and_what_is_merged(mlp):
    layer = get_peft_model(mlp.base(), LoraConfig(target_modules=["fc"])).base_model.model.body.layers[0]["fc"]
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(layer.get_base_layer(), nn.Linear)
    assert (layer.active_adapters, layer.disable_adapters, layer.merged) == (["default"], False, False)
    assert peft_interface.check_adapters_to_merge(layer) == ["default"]
    layer.merge()
    assert (layer.merged, layer.merged_adapters) == (True, ["default"])
    layer.set_adapter(["default"], inference_mode=True)
    layer.enable_adapters(False)
    assert layer.disable_adapters


def test_a_module_that_is_saved_in_full_tells_its_copies(mlp):
    model = get_peft_model(mlp.base(), LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    (wrapper,) = [each for each in model.modules() if isinstance(each, peft_interface.ModulesToSaveWrapper)]
    assert isinstance(wrapper, peft_interface.AuxiliaryTrainingWrapper)
    assert isinstance(wrapper.original_module, nn.Linear)
    assert torch.equal(wrapper.modules_to_save["default"].weight, wrapper.original_module.weight)
    assert set(wrapper.adapter_state_dict("default", wrapper.state_dict())) == {"weight", "bias"}


@pytest.mark.parametrize(("task", "heads"), [("TOKEN_CLS", {"classifier", "score"}), ("QUESTION_ANS", {"qa_outputs"})])
def test_heads_that_a_task_saves_in_full(bert, task, heads):
    made = {
        "TOKEN_CLS": transformers.BertForTokenClassification,
        "QUESTION_ANS": transformers.BertForQuestionAnswering,
    }[task](bert.base().config)
    model = get_peft_model(made, LoraConfig(task_type=task, target_modules=["query"]))
    assert set(model.peft_config["default"].modules_to_save) == heads


def test_how_targets_are_matched():
    exists = peft_interface.check_target_module_exists
    config = LoraConfig(target_modules=["fc"], exclude_modules=["1.fc"])
    assert exists(config, "layers.0.fc")
    assert not exists(config, "layers.1.fc")
    assert not exists(config, "layers.0.fc2")
    assert exists(LoraConfig(target_modules=r".*\.fc\d"), "layers.0.fc2")


def test_all_linear_becomes_names_without_the_head(gpt2):
    config = LoraConfig(target_modules="all-linear")
    peft_interface._maybe_include_all_linear_layers(config, gpt2.base())
    assert {name.rpartition(".")[2] for name in config.target_modules} == {"c_attn", "c_proj", "c_fc"}


# --- files ---


def test_names_in_files(mlp, tmp_path):
    model = get_peft_model(mlp.base(), LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    keys = set(get_peft_model_state_dict(model))
    assert {key for key in keys if "layers.0" in key} == {
        f"base_model.model.body.layers.0.fc.lora_{factor}.weight" for factor in "AB"
    }
    assert {key for key in keys if "head" in key} == {"base_model.model.head.weight", "base_model.model.head.bias"}
    model.save_pretrained(tmp_path)
    assert (tmp_path / peft_interface.SAFETENSORS_WEIGHTS_NAME).exists()
    assert {"embed_tokens", "lm_head"} <= set(peft_interface.EMBEDDING_LAYER_NAMES)


def test_patterns_of_ranks_are_anchored_by_a_caret(mlp):
    config = LoraConfig(target_modules=["fc"], r=1, rank_pattern={r"^body\.layers\.0\.fc": 3})
    model = get_peft_model(mlp.base(), config).base_model.model
    assert [layer["fc"].r["default"] for layer in model.body.layers] == [3, 1]


# --- transformers ---


def test_transformers_takes_this_peft():
    wanted, its = transformers.integrations.peft.MIN_PEFT_VERSION, transformers.__version__
    assert Version(peft.__version__) >= Version(wanted), (
        f"exclude transformers {its}: its `add_adapter` wants {wanted}"
    )
