"""Adapters through transformers' own methods (`model.add_adapter`, ...), without a `PeftModel`."""

from __future__ import annotations

import pytest
import torch

from peft_dps import DPSLayer, dps_adapter


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


@pytest.fixture
def injected(transformer):
    model = transformer.base()
    model.add_adapter(transformer.config(init_weights=False), "one")
    return model


pytestmark = [
    pytest.mark.device,
    pytest.mark.supports(
        "Adapters", "transformers' `add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`"
    ),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter two was active which is now deleted:UserWarning"),
]


def test_add_disable_and_enable(transformer, injected):
    expected = transformer.output(transformer.base())
    active = transformer.output(injected)
    assert not torch.allclose(active, expected, atol=1e-4)
    injected.disable_adapters()
    assert torch.equal(transformer.output(injected), expected)
    injected.enable_adapters()
    assert torch.equal(transformer.output(injected), active)


def test_several_adapters(transformer, injected):
    first = transformer.output(injected)
    injected.add_adapter(transformer.config(init_weights=False), "two")
    assert injected.active_adapters() == ["two"]
    second = transformer.output(injected)
    assert not torch.allclose(first, second, atol=1e-4)
    injected.set_adapter("one")
    assert torch.equal(transformer.output(injected), first)
    for layer in dps_layers(injected):
        assert layer.dps_weight["one"].requires_grad
        assert not layer.dps_weight["two"].requires_grad
    injected.set_adapter(["one", "two"])
    assert not torch.allclose(transformer.output(injected), first, atol=1e-4)


def test_training_engages(transformer, injected):
    transformer.train(injected, steps=3)
    status = dps_adapter(injected).status()
    assert (status.steps, status.engaged, status.frozen_moved) == (3, True, False)


def test_delete(transformer, injected):
    first = transformer.output(injected)
    injected.add_adapter(transformer.config(init_weights=False), "two")
    injected.delete_adapter("two")
    assert not [name for name in injected.state_dict() if "two" in name]
    injected.set_adapter("one")
    assert torch.equal(transformer.output(injected), first)
    with pytest.raises(ValueError, match="cannot be deleted: two"):
        injected.delete_adapter("two")
    injected.delete_adapter("one")
    assert torch.equal(transformer.output(injected), transformer.output(transformer.base()))


@pytest.mark.supports("Saving and loading", "transformers' `save_pretrained` and `load_adapter`")
@pytest.mark.parametrize("is_trainable", [False, True])
def test_save_and_load(transformer, injected, tmp_path, is_trainable):
    injected.save_pretrained(tmp_path)
    loaded = transformer.base()
    loaded.load_adapter(str(tmp_path), "one", is_trainable=is_trainable)
    assert torch.equal(transformer.output(loaded), transformer.output(injected))
    assert {layer.dps_weight["one"].requires_grad for layer in dps_layers(loaded)} == {is_trainable}


@pytest.mark.supports("Dtypes", "fp32 copies on a bf16 or fp16 base, also through transformers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_fp32_copies(gpt2, tmp_path, dtype):
    model = gpt2.base().to(dtype)
    model.add_adapter(gpt2.config(), "one")
    for layer in dps_layers(model):
        assert layer.dps_weight["one"].dtype == torch.float32
        layer.dps_weight["one"].data += 1e-5  # more digits than the base's dtype has
    model.save_pretrained(tmp_path)
    loaded = gpt2.base().to(dtype)
    loaded.load_adapter(str(tmp_path), "one")
    for mine, theirs in zip(dps_layers(loaded), dps_layers(model), strict=True):
        assert mine.dps_weight["one"].dtype == torch.float32
        assert torch.equal(mine.dps_weight["one"], theirs.dps_weight["one"])


def test_the_state_dict_of_an_adapter(transformer, injected):
    state_dict = injected.get_adapter_state_dict("one")
    trained = [tensor for layer in dps_layers(injected) for tensor in layer.dps_weight.values()]
    pointers = {tensor.data_ptr() for tensor in state_dict.values()}
    assert {tensor.data_ptr() for tensor in trained} <= pointers
    assert not [name for name in state_dict if "base_layer" in name]
