"""`export_adapter(form="lora")`: a compact adapter as a LoRA, which plain PEFT loads and which computes the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

from peft_dps import DPSConfig, DPSLayer, export_adapter
from peft_dps.errors import ConfigError, TargetError
from tests.contract.conftest import FLOATS, MLP, TOKENS, Case, TextNet, make_gpt2
from tests.device import DEVICE

pytestmark = pytest.mark.device
COMPACT = {"storage": "compact", "schedule": "once", "score_steps": 1, "units": 3, "train_bias": False}


class PlainConvs(nn.Module):
    """Convolutions over 1, 2 and 3 dimensions of which PEFT has LoRAs."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.volume = nn.Conv3d(1, 3, (3, 3, 1), padding="same")
        self.line = nn.Conv1d(8, 6, 2, padding=1)
        self.point = nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.flat(x))
        x = self.volume(x.unsqueeze(1)).sum(1).flatten(2)
        return self.point(torch.tanh(self.line(x)).unsqueeze(-1)).mean((-1, -2))


IMAGES = torch.linspace(-2, 2, 288).view(2, 4, 6, 6).sin()
CASES = [
    Case("mlp", MLP, FLOATS, {"target_modules": ["fc", "proj"]}),
    Case("gpt2", make_gpt2, TOKENS, {"task_type": "CAUSAL_LM"}),
    Case("text", TextNet, TOKENS, {"target_modules": ["words", "places", "head"]}),
]
CONVS = Case("convs", PlainConvs, IMAGES, {"target_modules": ["flat", "volume", "line", "point"]})
POINT = Case("point", PlainConvs, IMAGES, {"target_modules": ["point"], "granularity": "column"})


def compact(case, steps=4, **options):
    """Train a compact adapter."""
    model = case.model(**{**COMPACT, "granularity": "column", **case.options, **options})
    case.train(model, steps=steps)
    return model


def plain(case, path, name="default", **options):
    """Load what was exported as plain PEFT does."""
    loaded = PeftModel.from_pretrained(case.base(), path, adapter_name=name, **options).eval()
    assert type(loaded.peft_config[name]) is LoraConfig
    return loaded


def exported_layers(model):
    layers = {key: module for key, module in model.named_modules() if isinstance(module, (DPSLayer, LoraLayer))}
    return {key: layer for key, layer in layers.items() if not any(key.startswith(f"{other}.") for other in layers)}


def assert_computes_the_same(case, model, loaded, adapter="default", name="default"):
    torch.testing.assert_close(case.output(loaded), case.output(model), rtol=1e-6, atol=1e-6)
    mine, theirs = exported_layers(model), exported_layers(loaded)
    assert theirs
    for key, layer in mine.items():
        expected = layer.get_delta_weight(adapter)
        if key in theirs:
            assert torch.equal(theirs[key].get_delta_weight(name), expected), key
        else:
            assert not expected.any(), key


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.supports("Saving and loading", "a compact adapter of rows or columns as a LoRA (`form='lora'`)")
@pytest.mark.parametrize("granularity", ["column", "row"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_peft_computes_the_same(case, granularity, tmp_path, snapshot):
    model = compact(case, granularity=granularity)
    before = snapshot(model)
    report = export_adapter(model, tmp_path, form="lora")
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_computes_the_same(case, model, plain(case, tmp_path))
    assert not torch.equal(case.output(model), case.output(case.base()))
    assert (report.rank, report.max_lora_rank) == (3, 8)
    assert report.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["bias"]) == (3, 3, {}, "none")
    assert config["modules_to_save"] is None
    assert (config["use_rslora"], config["use_dora"]) == (False, False)
    names = re.compile(r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
    found = {names.fullmatch(key)[1] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert found == set(report.ranks)


@pytest.mark.parametrize("case", [CONVS, POINT], ids=lambda case: case.name)
def test_convolutions(case, tmp_path):
    model = compact(case, granularity=case.options.get("granularity", "row"))
    report = export_adapter(model, tmp_path, form="lora")
    assert_computes_the_same(case, model, plain(case, tmp_path))
    assert report.max_lora_rank is None
    assert "convolutions" in str(report)


@pytest.mark.parametrize("schedule", ["every", "cycle"])
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_units_that_are_trained_no_more_are_written_too(granularity, schedule, tmp_path):
    case = CASES[0]
    lengths = {"stage_steps": 2, "score_steps": {"every": 1, "cycle": 8}[schedule]}
    model = compact(case, steps=12, granularity=granularity, schedule=schedule, **lengths)
    deltas = [layer.dps_delta["default"] for layer in exported_layers(model).values()]
    assert any(delta.kept is not None for delta in deltas)
    report = export_adapter(model, tmp_path, form="lora")
    assert report.rank == max(delta.held.numel() for delta in deltas)
    assert set(report.ranks.values()) == {report.rank}, "one rank, which vLLM wants"
    assert not report.not_served
    assert_computes_the_same(case, model, plain(case, tmp_path))


def test_a_density_makes_ranks_that_differ(tmp_path):
    case = Case("bert-like", Nested, FLOATS, {"target_modules": r"proj|proj\.proj|inner\.x-proj|inner\.proj"})
    model = compact(case, units=None, density=0.25, scope="model", granularity="row")
    report = export_adapter(model, tmp_path / "own", form="lora")
    assert len(set(report.ranks.values())) > 1
    loaded = plain(case, tmp_path / "own")
    assert_computes_the_same(case, model, loaded)
    assert {
        key.removeprefix("base_model.model."): layer.r["default"] for key, layer in exported_layers(loaded).items()
    } == report.ranks
    assert report.max_lora_rank is None
    most = report.rank
    assert f"export it with `rank={most}`" in str(report)
    filled = export_adapter(model, tmp_path / "one", form="lora", rank=most)
    assert filled.max_lora_rank is not None
    assert set(filled.ranks.values()) == {most}
    assert_computes_the_same(case, model, plain(case, tmp_path / "one"))
    with pytest.raises(ConfigError, match=rf"`rank` must be an integer of at least {most}, .* got {most - 1}"):
        export_adapter(model, tmp_path / "less", form="lora", rank=most - 1)
    assert not (tmp_path / "less").exists()


class Nested(nn.Module):
    """Targets whose paths are ends of others, and hold what an expression takes for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 12), "x-proj": nn.Linear(12, 8), "xxproj": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner["x-proj"](torch.tanh(self.inner["proj"](torch.tanh(self.proj(x)))))
        return self.inner["xxproj"](hidden)


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (r"proj|inner\.proj", ["proj"]),
        (r"inner\.proj", ["inner.proj"]),
        ("proj", "proj"),  # as a list it would be the other's, too
        (r"proj|inner\.x-proj", r"inner\.x\-proj|proj"),
        (r"proj|inner\..*", ["proj", "x-proj", "xxproj"]),
    ],
)
def test_targets_are_named_as_a_user_of_lora_would(targets, written, tmp_path):
    case = Case("nested", Nested, FLOATS, {"target_modules": targets})
    model = compact(case)
    report = export_adapter(model, tmp_path, form="lora")
    found = config_of(tmp_path)["target_modules"]
    assert (found if isinstance(found, str) else sorted(found)) == written
    loaded = plain(case, tmp_path)
    assert {key.removeprefix("base_model.model.") for key in exported_layers(loaded)} == set(report.ranks)
    assert_computes_the_same(case, model, loaded)


def test_heads_are_written_as_peft_writes_them(bert, tmp_path):
    model = compact(bert)
    report = export_adapter(model, tmp_path, form="lora")
    assert "modules_to_save" in report.not_served[0]
    assert report.max_lora_rank is None
    assert "PEFT loads it, vLLM does not" in str(report)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = plain(bert, tmp_path)
    assert_computes_the_same(bert, model, loaded)
    for low_cpu_mem_usage in (True, False):
        again = plain(bert, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(bert.output(again), bert.output(loaded))


FRESH = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(torch.arange(2, 14).view(2, 6)).logits.detach(), sys.argv[2])
assert "peft_dps" not in sys.modules
assert {config.peft_type.value for config in model.peft_config.values()} == {"LORA"}
"""


def test_a_process_that_never_imports_peft_dps(gpt2, tmp_path):
    gpt2.base().save_pretrained(tmp_path / "base")
    base = type(gpt2.base()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, gpt2.config(**COMPACT, granularity="column")).eval()
    gpt2.train(model, steps=3)
    export_adapter(model, tmp_path / "adapter", form="lora")
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "base")
    command = [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    ours = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    command[2:3] = ["error", "-W", ours]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        command,
        check=False,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    logits = torch.load(tmp_path / "logits.pt", map_location=DEVICE)
    torch.testing.assert_close(logits, gpt2.output(model), rtol=1e-5, atol=1e-6)


def test_names_of_adapters_and_merged_models(tmp_path):
    case = CASES[0]
    model = case.model()
    model.add_adapter("other", case.config(**COMPACT, granularity="row"))
    model.set_adapter("other")
    case.train(model, steps=3)
    output = case.output(model)
    model.merge_adapter(["other"])
    report = export_adapter(model, tmp_path, form="lora")
    assert report.adapter == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    torch.testing.assert_close(case.output(plain(case, tmp_path / "other")), output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_values_keep_their_dtype(dtype, tmp_path):
    case = CASES[0]
    config = case.config(**COMPACT, granularity="column")
    model = get_peft_model(case.base().to(dtype), config, autocast_adapter_dtype=False)
    for layer in exported_layers(model).values():
        delta = layer.dps_delta["default"]
        delta.take(torch.arange(3, dtype=torch.int32, device=delta.index.device), layer.pretrained_weight)
        nn.init.normal_(delta.weight)
    export_adapter(model, tmp_path, form="lora")
    loaded = PeftModel.from_pretrained(case.base().to(dtype), tmp_path, autocast_adapter_dtype=False)
    for mine, theirs in zip(exported_layers(model).values(), exported_layers(loaded).values(), strict=True):
        assert mine.dps_delta["default"].weight.dtype is theirs.lora_B["default"].weight.dtype is dtype
        assert torch.equal(theirs.get_delta_weight("default"), mine.get_delta_weight("default"))


def with_trained_bias():
    return compact(CASES[0], train_bias=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (CASES[0].model, "`storage='compact'`, and 'default' has `storage='copy'`.*Use `form='difference'`"),
        (
            lambda: CASES[0].model(**COMPACT, granularity="column"),
            "selected none yet. Train it past its `score_steps`",
        ),
        (lambda: compact(CASES[0], granularity="entry", units=None, density=0.1), "selects entries, tiles or whole"),
        (lambda: compact(CASES[0], granularity="submatrix", units=1), "selects entries, tiles or whole"),
        (lambda: compact(CASES[0], granularity="tensor", units=None), "`granularity='row'` or `'column'`"),
        (lambda: compact(CASES[0], granularity="block", units=None), "`granularity='row'` or `'column'`"),
        (with_trained_bias, "has trained that of 'body.layers.0.fc'. Train with `train_bias=False`"),
    ],
    ids=["copy", "nothing selected", "entry", "submatrix", "tensor", "block", "bias"],
)
@pytest.mark.refuses(
    "Saving and loading", "entries and whole weights as a LoRA", "their differences have no small rank"
)
def test_what_is_no_lora(make, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_adapter(make(), tmp_path / "x", form="lora")
    assert not (tmp_path / "x").exists()


def test_biases_that_did_not_move_are_left_out(tmp_path):
    case = CASES[0]
    model = case.model(**{**COMPACT, "train_bias": True}, granularity="column")
    biases = [parameter for name, parameter in model.named_parameters() if "dps_bias" in name]
    for bias in biases:
        bias.requires_grad_(False)
    case.train(model, steps=3)
    export_adapter(model, tmp_path, form="lora")
    assert biases
    assert_computes_the_same(case, model, plain(case, tmp_path))


@pytest.mark.parametrize(
    ("layer", "granularity", "problem"),
    [
        (nn.Conv2d(4, 4, 3, groups=2, padding=1), "row", "groups=2"),
        (nn.Conv2d(4, 4, 3, dilation=2, padding=2), "row", r"dilation=\(2, 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "row", "padding_mode='circular'"),
        (nn.Conv2d(4, 4, 3, padding=1), "column", r"columns of a kernel of \(3, 3\)"),
    ],
)
def test_convolutions_that_a_lora_cannot_express(layer, granularity, problem, tmp_path):
    case = Case("conv", lambda: nn.Sequential(layer), IMAGES, {"target_modules": ["0"]})
    model = compact(case, granularity=granularity)
    with pytest.raises(TargetError, match=rf"The convolution '0' has {problem}, .*Leave it out"):
        export_adapter(model, tmp_path / "x", form="lora")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "svd"}, "`form` must be 'difference' or 'lora', got 'svd'"),
        ({"form": "lora", "whole": ["head"]}, "`whole=.* has nothing to do with `form='lora'`"),
        ({"form": "lora", "saved_modules": ["head"]}, "`saved_modules=.* has nothing to do"),
        ({"rank": 4}, "`rank=4` has nothing to do with `form='difference'`"),
        ({"form": "lora", "rank": True}, "`rank` must be an integer of at least 3"),
    ],
)
def test_arguments_that_cannot_work(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_adapter(compact(CASES[0]), tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_a_rank_that_vllm_does_not_have(tmp_path):
    report = export_adapter(compact(CASES[0]), tmp_path, form="lora", rank=513)
    assert "its rank is more than 512" in str(report)
    report = export_adapter(compact(CASES[0]), tmp_path, form="lora", rank=200)
    assert report.max_lora_rank == 256
    assert str(report).endswith("vLLM serves it with --max-lora-rank 256")


def make_lora(case, path, r):
    """Save a LoRA that PEFT made."""
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=case.options["target_modules"], init_lora_weights=False)
    model = get_peft_model(case.base(), config).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.supports("Saving and loading", "the exported LoRA in PEFT: hot-swapped, one per sample, mixed")
@pytest.mark.parametrize("r", [2, 5], ids=["larger than before", "smaller than before"])
def test_it_is_hot_swapped(r, tmp_path):
    case = CASES[0]
    model = compact(case)
    export_adapter(model, tmp_path / "dps", form="lora")
    live = make_lora(case, tmp_path / "lora", r)
    hotswap_adapter(live, tmp_path / "dps", adapter_name="default", torch_device=str(DEVICE))
    torch.testing.assert_close(case.output(live), case.output(model), rtol=1e-6, atol=1e-6)


@pytest.mark.supports("Saving and loading", "the exported LoRA in PEFT: hot-swapped, one per sample, mixed")
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_a_batch_of_several_adapters(case, tmp_path):
    model = compact(case)
    export_adapter(model, tmp_path / "dps", form="lora")
    lora = make_lora(case, tmp_path / "lora", r=2)
    served = plain(case, tmp_path / "dps", name="dps")
    served.load_adapter(tmp_path / "lora", "other")
    inputs = case.inputs[:1].repeat(3, *[1] * (case.inputs.dim() - 1))
    mixed = served(inputs, adapter_names=["dps", "other", "__base__"])
    alone = torch.cat([source(inputs[:1]) for source in (model, lora, case.base())])
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.supports("Saving and loading", "the exported LoRA in PEFT: hot-swapped, one per sample, mixed")
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_it_is_mixed_with_another_lora(case, tmp_path):
    model = compact(case)
    export_adapter(model, tmp_path / "dps", form="lora")
    make_lora(case, tmp_path / "lora", r=2)
    served = plain(case, tmp_path / "dps", name="dps")
    served.load_adapter(tmp_path / "lora", "other")
    served.add_weighted_adapter(["dps", "other"], [0.75, 0.5], "mixed", combination_type="cat")
    for layer in exported_layers(served).values():
        expected = 0.75 * layer.get_delta_weight("dps") + 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("mixed"), expected, rtol=1e-5, atol=1e-6)


def test_linear_mixing_adds_factors_as_it_does_of_any_lora(tmp_path):
    case = CASES[0]
    export_adapter(compact(case), tmp_path / "one", form="lora")
    served = plain(case, tmp_path / "one", name="one")
    served.load_adapter(tmp_path / "one", "two")
    served.add_weighted_adapter(["one", "two"], [0.25, 0.75], "mixed", combination_type="linear")
    factor = (0.25**0.5 + 0.75**0.5) ** 2  # of both A and B, roots are added up
    for layer in exported_layers(served).values():
        expected = factor * layer.get_delta_weight("one")
        torch.testing.assert_close(layer.get_delta_weight("mixed"), expected, rtol=1e-5, atol=1e-6)


def test_peft_raises_no_warning_of_its_own(tmp_path):
    for case in CASES[:2]:
        model = compact(case)
        export_adapter(model, tmp_path / case.name, form="lora")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            plain(case, tmp_path / case.name)


def test_what_is_loaded_trains_on(tmp_path):
    case = CASES[0]
    export_adapter(compact(case), tmp_path, form="lora")
    loaded = plain(case, tmp_path, is_trainable=True)
    before = case.output(loaded)
    case.train(loaded, steps=2)
    assert not torch.equal(case.output(loaded), before)


def test_an_adapter_that_copies_beside_it(tmp_path):
    """Only the adapter that is exported has to be compact."""
    case = CASES[0]
    model = compact(case)
    model.add_adapter("copied", DPSConfig(target_modules=["fc"], init_weights=False))
    export_adapter(model, tmp_path, form="lora", adapter_name="default")
    model.set_adapter("default")
    assert_computes_the_same(case, model, plain(case, tmp_path))
