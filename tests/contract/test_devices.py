"""Base models in each dtype, on each device, and placed by Accelerate."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model, init_empty_weights
from peft import get_peft_model
from torch import nn

from peft_dps import DPSLayer, Stage
from peft_dps.errors import TargetError
from tests.device import DEVICE

pytestmark = pytest.mark.device

HERE = str(DEVICE)
PARTS = ("wte", "wpe", "drop", "h.0", "h.1", "ln_f")
EVERYWHERE = {**{f"transformer.{part}": HERE for part in PARTS}, "lm_head": HERE}


def dps_layers(model):
    return [module for module in model.modules() if isinstance(module, DPSLayer)]


@pytest.mark.supports("Dtypes", "base, {variant}", row="dtype")
@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_both_stages_train_in_every_dtype(gpt2, dtype, variant):
    base = gpt2.base().to(getattr(torch, dtype))
    model = get_peft_model(base, gpt2.config(variant=variant))
    gpt2.train(model, steps=4)
    status = model.dps_status()
    assert (status.steps, status.stage, status.engaged, status.frozen_moved) == (4, Stage.SUBNETWORK, True, False)
    copies = {layer.dps_weight["default"].dtype for layer in dps_layers(model)}
    assert copies == {torch.float64 if dtype == "float64" else torch.float32}
    trained = gpt2.output(model)
    assert trained.dtype == getattr(torch, dtype)
    assert trained.isfinite().all()
    with model.disable_adapter():
        assert torch.equal(gpt2.output(model), gpt2.output(gpt2.base().to(getattr(torch, dtype))))
    tolerance = 1e-5 if dtype in ("float32", "float64") else 2e-2
    torch.testing.assert_close(gpt2.output(model.merge_and_unload()), trained, rtol=tolerance, atol=tolerance)


@pytest.mark.supports("Dtypes", "autocast, {variant}", row="dtype")
@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_stages_train_under_autocast(transformer, dtype, variant):
    model = transformer.model(variant=variant)
    optimizer = transformer.optimizer(model)
    model.train()
    for _ in range(4):
        with torch.autocast(DEVICE.type, dtype=getattr(torch, dtype)):  # it keeps cast weights until its end
            loss = transformer.output(model).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    status = model.dps_status()
    assert (status.steps, status.engaged, status.frozen_moved) == (4, True, False)
    assert {layer.dps_weight["default"].dtype for layer in dps_layers(model)} == {torch.float32}
    with torch.autocast(DEVICE.type, dtype=getattr(torch, dtype)):
        half = transformer.output(model)
    torch.testing.assert_close(half.float(), transformer.output(model), rtol=0.1, atol=0.05)


@pytest.mark.supports("Devices", "`device_map` without offloading")
@pytest.mark.parametrize("device_map", [HERE, "auto", {"": HERE}, EVERYWHERE], ids=["one", "auto", "root", "dict"])
def test_placed_models(gpt2, tmp_path, device_map):
    gpt2.base().save_pretrained(tmp_path)
    base = type(gpt2.base()).from_pretrained(tmp_path, device_map=device_map).eval()
    model = get_peft_model(base, gpt2.config()).eval()
    torch.testing.assert_close(gpt2.output(model), gpt2.output(gpt2.base()), rtol=1e-5, atol=1e-6)
    gpt2.train(model, steps=3)
    assert model.dps_status().engaged
    expected = gpt2.output(model)
    torch.testing.assert_close(gpt2.output(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.supports("Devices", "Accelerate's dispatch hooks on the base model")
def test_dispatched_models_keep_their_hooks(gpt2):
    base = dispatch_model(gpt2.base(), EVERYWHERE, force_hooks=True)
    assert hasattr(base.transformer.h[0].mlp.c_fc, "_hf_hook")
    model = get_peft_model(base, gpt2.config()).eval()
    gpt2.train(model, steps=3)
    assert model.dps_status().engaged
    expected = gpt2.output(model)
    with model.disable_adapter():
        assert torch.equal(gpt2.output(model), gpt2.output(gpt2.base()))
    torch.testing.assert_close(gpt2.output(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.refuses(
    "Devices",
    "offloaded target layers (`device_map` with 'disk', or 'cpu' beside a GPU)",
    "their weights exist only during a forward, so there is nothing for an optimizer to update",
)
def test_offloaded_targets(gpt2, tmp_path):
    gpt2.base().save_pretrained(tmp_path / "base")
    base = type(gpt2.base()).from_pretrained(
        tmp_path / "base", device_map={**EVERYWHERE, "transformer.h.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(TargetError, match=r"'transformer\.h\.1\.attn\.c_attn' is offloaded") as caught:
        get_peft_model(base, gpt2.config())
    assert "Load the model without offloading" in str(caught.value)
    assert not dps_layers(base)
    model = get_peft_model(base, gpt2.config(layers_to_transform=[0])).eval()
    gpt2.train(model, steps=3)
    assert model.dps_status().engaged


@pytest.mark.refuses(
    "Devices",
    "base weights on the meta device",
    "there is nothing to copy: load the weights first",
)
def test_empty_models(gpt2):
    with init_empty_weights():
        base = gpt2.make()
    with pytest.raises(TargetError, match=r"'transformer\.h\.0\.attn\.c_attn' is empty, on the meta device"):
        get_peft_model(base, gpt2.config())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_a_model_trains_on_a_gpu(gpt2, variant):
    model = gpt2.model(variant=variant).to("cuda")
    inputs = gpt2.inputs.to("cuda")
    optimizer = gpt2.optimizer(model)
    model.train()
    for _ in range(4):
        nn.functional.mse_loss(model(inputs).logits, torch.zeros(1, device="cuda")).backward()
        optimizer.step()
        optimizer.zero_grad()
    status = model.dps_status()
    assert (status.steps, status.engaged, status.frozen_moved) == (4, True, False)
