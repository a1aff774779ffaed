"""What PEFT offers and DPS does not take part in: refused with the reason, and never ignored."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter

from peft_dps import DPSLayer, export_adapter
from peft_dps.errors import ConfigError, TargetError


def test_tensor_parallelism_of_older_transformers(mlp):
    """Its weights are plain tensors, of which nothing tells what they are a part of."""
    base = mlp.base()
    next(module for module in base.modules() if isinstance(module, torch.nn.Linear))._hf_tp_plan = "colwise"
    with pytest.raises(TargetError, match=r"older transformers.*upgrade it"):
        get_peft_model(base, mlp.config())


@pytest.mark.refuses(
    "Adapters",
    "tuners of several kinds in one model (`PeftMixedModel`)",
    "PEFT keeps a fixed list of the tuners that it mixes",
)
def test_mixed_models(mlp):
    with pytest.raises(ValueError, match="'DPS' is not compatible with the `PeftMixedModel`"):
        get_peft_model(mlp.base(), mlp.config(), mixed=True)
    model = PeftMixedModel(mlp.base(), LoraConfig(target_modules=["fc"]))
    with pytest.raises(ValueError, match="'DPS' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("other", mlp.config(modules_to_save=None))


@pytest.mark.refuses(
    "Saving and loading",
    "hot-swapping (`peft.utils.hotswap`)",
    "PEFT hot-swaps LoRA only; `load_adapter` under the existing name keeps the parameters and does the same",
)
def test_hotswap(mlp, tmp_path):
    source, model = mlp.model(init_weights=False), mlp.model()
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA but DPS was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    parameters = list(map(id, model.parameters()))
    model.load_adapter(tmp_path, "default")
    assert list(map(id, model.parameters())) == parameters
    assert torch.equal(mlp.output(model), mlp.output(source))


@pytest.mark.refuses(
    "Saving and loading",
    "hot-swapping in transformers (`load_adapter(hotswap=True)`)",
    "transformers does so for LoRA only",
)
def test_hotswap_of_transformers(gpt2, tmp_path):
    model = gpt2.base()
    model.add_adapter(gpt2.config(), "default")
    # Before 5, `load_adapter` has no such argument.
    with pytest.raises(
        (ValueError, TypeError), match=r"only supported for LoRA|unexpected keyword argument 'hotswap'"
    ):
        model.load_adapter(str(tmp_path), "default", hotswap=True)


@pytest.mark.refuses(
    "Saving and loading",
    "exact small files through transformers' `load_adapter`",
    "transformers 5 reads adapter files with code of its own, and knows plain tensors only",
)
def test_small_files_in_transformers(gpt2, tmp_path):
    source, model = gpt2.model(init_weights=False), gpt2.base()
    export_adapter(source, tmp_path)
    if Version(transformers.__version__) >= Version("5"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            model.load_adapter(str(tmp_path), "default")
    else:
        model.load_adapter(str(tmp_path), "default")
        assert torch.equal(gpt2.output(model), gpt2.output(source))


@pytest.mark.refuses(
    "Adapters",
    "several adapters active that have `modules_to_save`",
    "PEFT cannot tell which copy to run; `add_weighted_adapter` makes one of them",
)
def test_several_active_copies_of_a_module(mlp):
    model = mlp.model()
    model.add_adapter("other", mlp.config())
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.refuses("Adapters", "deleting an adapter while it is merged", "PEFT wants it unmerged first")
def test_deleting_a_merged_adapter(mlp):
    model = mlp.model(init_weights=False)
    model.add_adapter("other", mlp.config(init_weights=False))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    model.unmerge_adapter()
    model.base_model.delete_adapter("default")
    assert torch.equal(model.base_model.model.head.original_module.weight, mlp.base().head.weight)


@pytest.mark.refuses(
    "Adapters", "`rescale_adapter_scale`", "DPS has no scale; `add_weighted_adapter` with one factor has"
)
def test_rescaling(gpt2):
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(gpt2.model(), 0.5),
    ):
        pass


@pytest.mark.refuses(
    "Saving and loading",
    "`path_initial_model_for_weight_conversion`",
    "it turns LoRAs into LoRAs; `convert_to_lora` makes one of a DPS adapter",
)
def test_conversion_from_an_initial_adapter(mlp, tmp_path):
    with pytest.raises(ValueError, match="not supported for DPSModel"):
        mlp.model().save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


@pytest.mark.parametrize("field", ["trainable_token_indices", "bias", "rank_pattern"])
def test_fields_of_other_tuners(field):
    from peft_dps import DPSConfig

    with pytest.raises(TypeError, match=field):
        DPSConfig(**{field: None})


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained")
@pytest.mark.parametrize("name", ["", "a.b", "..", "/abs", "a/b", "a\\b", 3, None, ("a",)])
def test_adapter_names_that_name_no_parameter_and_no_folder(mlp, tmp_path, name):
    model = mlp.model()
    model.save_pretrained(tmp_path)
    before = set(model.state_dict())
    attempts = [
        lambda: inject_adapter_in_model(mlp.config(modules_to_save=None), mlp.base(), name),
        lambda: model.add_weighted_adapter(["default"], [1.0], name),
    ]
    if isinstance(name, str):  # PEFT itself compares the name with strings before a tuner is asked
        attempts += [
            lambda: get_peft_model(mlp.base(), mlp.config(), name),
            lambda: model.add_adapter(name, mlp.config()),
            lambda: model.load_adapter(tmp_path, name),
        ]
    for attempt in attempts:
        with pytest.raises(
            ConfigError, match=re.escape(f"`adapter_name` must be a word without dots and slashes, got {name!r}")
        ):
            attempt()
    assert list(model.peft_config) == ["default"]
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("name", ["half", "train", "keys"])
def test_adapter_names_that_torch_has_taken(mlp, name):
    with pytest.raises(ConfigError, match=f"`adapter_name` must not be '{name}'"):
        get_peft_model(mlp.base(), mlp.config(), adapter_name=name)
    model = mlp.model()
    with pytest.raises(ConfigError, match=f"`adapter_name` must not be '{name}'"):
        model.add_adapter(name, mlp.config())
    assert list(model.peft_config) == ["default"]
    assert {key for layer in model.modules() if isinstance(layer, DPSLayer) for key in layer.dps_weight} == {"default"}
    mlp.train(model, steps=3)
    assert model.dps_status().engaged
    assert isinstance(model, PeftModel)
