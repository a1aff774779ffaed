"""Compact columns and rows beside base layers of every kind, which they call and never read or write."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_dps import DPSConfig, DPSLayer, export_adapter, register_score
from peft_dps.errors import TargetError
from peft_dps.selection.scores import SCORES
from tests.contract.base_layers import COMPUTED, ORDINARY, QUANTIZED, Net, Packed, bytes_of, weight_of
from tests.device import DEVICE

pytestmark = pytest.mark.device

X = torch.linspace(-2, 2, 64).view(8, 8).sin().to(DEVICE)
Y = torch.linspace(-1, 1, 24).view(8, 3).to(DEVICE)
HERE = str(DEVICE)
LORA = "LoRA of PEFT"
COMPACT = "`storage='compact'`, columns and rows"
COPY = "`storage='copy'`"
WHOLE = "`storage='compact'`, entries and weights"
EVERY = [*ORDINARY, *COMPUTED]
kinds = pytest.mark.parametrize("kind", [*EVERY, *QUANTIZED], ids=str)
quantized = pytest.mark.parametrize("kind", QUANTIZED, ids=str)
slices = pytest.mark.parametrize("granularity", ["column", "row"])


def config(granularity="column", **options):
    return DPSConfig.compact(
        **{"units": 4, "granularity": granularity, "target_modules": ["odd"], "score_steps": 2, **options}
    )


def wrap(kind, granularity="column", **options):
    return get_peft_model(Net(kind), config(granularity, **options))


def odd_of(model) -> DPSLayer:
    return model.base_model.model.odd


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)


def train(model, steps=12, parts=1, optimizer=None):
    """Train towards a fixed target; return the losses."""
    optimizer = optimizer or optimizer_of(model)
    model.train()
    losses = []
    for _ in range(steps):
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            loss = nn.functional.mse_loss(model(x), y) / parts
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(model(X), Y).item())
    return losses


def rows(mark, kinds, features, *details):
    """Parametrize with kinds of layers, each a row of docs/support.md."""
    sections = {True: "Base layers", False: "Quantized base models"}
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(
                kind,
                id=str(kind),
                marks=[mark(sections[kind in EVERY], feature, *details, row="kind") for feature in features],
            )
            for kind in kinds
        ],
    )


supports, refuses = pytest.mark.supports, pytest.mark.refuses


@rows(supports, [kind for kind in [*EVERY, *QUANTIZED] if kind.real], [LORA])
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@slices
def test_the_output_is_that_of_a_lora(kind, granularity):
    """With A one-hot and B the columns; or B one-hot and A the rows."""
    model = wrap(kind, granularity)
    train(model)
    delta = odd_of(model).dps_delta["default"]
    lora = get_peft_model(Net(kind), LoraConfig(target_modules=["odd"], r=4, lora_alpha=4))
    picked = nn.functional.one_hot(delta.index.long(), 16 if granularity == "column" else 24).float()
    factors = (picked, delta.weight) if granularity == "column" else (delta.weight, picked.t())
    with torch.no_grad():
        odd_of(lora).lora_A["default"].weight.copy_(factors[0])
        odd_of(lora).lora_B["default"].weight.copy_(factors[1])
    tolerance = 1e-5 if kind.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(model.eval()(X), lora.eval()(X), rtol=tolerance, atol=tolerance)


@slices
@rows(supports, [*EVERY, *QUANTIZED], [COMPACT])
def test_training_leaves_the_base_as_it_is(kind, granularity):
    model = wrap(kind, granularity)
    layer, pretrained = odd_of(model), Net(kind)
    base, expected = layer.get_base_layer(), pretrained(X)
    before = bytes_of(base)
    assert torch.equal(model(X), expected)
    losses = train(model, parts=2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(one, two) for one, two in zip(before, bytes_of(base), strict=True))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    delta = layer.dps_delta["default"]
    assert (delta.weight.dtype, delta.slots, layer.entries) == (torch.float32, 4, 16 * 24)
    dense = layer.get_delta_weight("default")
    assert dense.shape == (24, 16)
    assert dense.count_nonzero() == delta.weight.count_nonzero() > 0
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    assert not torch.equal(model(X), expected)
    assert torch.equal(model.unload()(X), expected)


@quantized
@slices
def test_output_and_gradients_are_those_of_the_dequantized_weight(kind, granularity):
    """In a layer by itself: scores before the selection, gradients of the units after it, and that of the input."""
    model = wrap(kind, granularity, train_bias=False)
    layer = odd_of(model).train()
    base = layer.get_base_layer()
    whole = weight_of(base).requires_grad_()
    exact = 2e-2 if kind.name == "bitsandbytes 8 bit" else 1e-5  # it rounds the input too
    x = torch.linspace(-1, 1, 5 * 16).view(5, 16).cos().to(DEVICE)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    layer(inputs[0]).square().sum().backward()
    (nn.functional.linear(inputs[1], whole, base.bias)).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=exact, atol=10 * exact)
    sums = layer.dps_controllers["default"].weights[0].sums.pending
    expected = whole.grad.double().square().sum(0 if granularity == "column" else 1)
    torch.testing.assert_close(sums, expected, rtol=2 * exact, atol=0)

    train(model)
    delta = layer.dps_delta["default"]
    delta.weight.grad = None
    added = layer.get_delta_weight("default").detach()
    together = (whole.detach() + added).requires_grad_()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y = layer(inputs[0])
    torch.testing.assert_close(y, nn.functional.linear(x, together, base.bias), rtol=exact, atol=exact)
    y.square().sum().backward()
    (nn.functional.linear(inputs[1], together, base.bias)).square().sum().backward()
    axis = 1 if granularity == "column" else 0
    of_units = together.grad.index_select(axis, delta.index)
    torch.testing.assert_close(delta.weight.grad, of_units, rtol=exact, atol=10 * exact)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=exact, atol=10 * exact)


@kinds
def test_passes_add_up_to_a_batch(kind):
    """Gradient accumulation: the units get the gradient of the whole batch."""
    model = wrap(kind)
    train(model, steps=4)
    weight = odd_of(model).dps_delta["default"].weight
    gradients = []
    for parts in (1, 4):
        weight.grad = None
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            (nn.functional.mse_loss(model(x), y) / parts).backward()
        gradients.append(weight.grad)
    tolerance = 1e-5 if kind.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@quantized
@pytest.mark.parametrize("schedule", ["every", "cycle"])
def test_selecting_again(kind, schedule):
    model = wrap(kind, schedule=schedule, stage_steps=3, score_steps={"every": 1, "cycle": 8}[schedule])
    before = bytes_of(odd_of(model).get_base_layer())
    losses = train(model, steps=14)
    assert losses[-1] < losses[0]
    status = model.dps_status()
    assert (status.engaged, status.frozen_moved) == (True, False)
    assert all(torch.equal(*pair) for pair in zip(before, bytes_of(odd_of(model).get_base_layer()), strict=True))


@kinds
def test_biases_are_trained_beside_it(kind):
    model = wrap(kind, train_bias=True)
    before = bytes_of(odd_of(model).get_base_layer())
    losses = train(model)
    assert losses[-1] < losses[0]
    bias = odd_of(model).dps_bias["default"]
    assert bias.dtype == torch.float32
    assert not torch.equal(bias, odd_of(model).get_base_layer().bias.float())
    assert all(torch.equal(*pair) for pair in zip(before, bytes_of(odd_of(model).get_base_layer()), strict=True))


@rows(
    refuses, QUANTIZED, [COPY, WHOLE], "it computes with the values of weights, which are not there in full precision"
)
def test_copies_and_whole_weights_are_refused(kind):
    for granularity in ("entry", "tensor", "block"):
        with pytest.raises(
            TargetError, match=rf"'odd' is quantized .*`granularity='{granularity}'` computes"
        ) as caught:
            wrap(kind, granularity, units=None, density=0.5)
        assert "use 'column' or 'row'" in str(caught.value)
    with pytest.raises(TargetError, match=r"'odd' is quantized .*`storage='compact'` with `granularity='column'` or"):
        get_peft_model(Net(kind), DPSConfig(stage_steps=2, target_modules=["odd"]))


@rows(supports, ORDINARY, [COPY, WHOLE])
def test_copies_and_entries_train_as_well(kind):
    for options in ({"granularity": "entry", "units": None, "density": 0.5}, {"storage": "copy"}):
        losses = train(wrap(kind, **options))
        assert losses[-1] < losses[0]


@rows(refuses, COMPUTED, [COPY, WHOLE], "there is no weight of its own to copy or to compute with")
def test_copies_of_what_is_computed_are_refused(kind):
    for options in (
        {"granularity": "entry", "density": 0.5, "units": None},
        {"storage": "copy", "granularity": "row"},
    ):
        with pytest.raises(TargetError, match=r"cannot (be trained|train)"):
            wrap(kind, **options)


@pytest.mark.parametrize("kind", [*COMPUTED, *QUANTIZED], ids=str)
def test_another_adapter_that_needs_the_weight_is_refused(kind):
    model = wrap(kind)
    with pytest.raises(TargetError, match=r"'odd' can be called only: its .*`storage='copy'`"):
        model.add_adapter("other", DPSConfig(stage_steps=2, target_modules=["odd"]))
    assert set(odd_of(model).dps_delta) == {"default"}
    model.add_adapter("other", config("row"))
    model.base_model.set_adapter(["default", "other"])
    train(model)
    model.delete_adapter("other")


@pytest.mark.parametrize("kind", [*COMPUTED, *QUANTIZED], ids=str)
def test_merging_is_refused_before_any_layer_has_changed(kind):
    model = wrap(kind, target_modules=["first", "odd", "head"])
    train(model)
    expected = model(X)
    for merge in (model.merge_adapter, model.merge_and_unload, odd_of(model).merge):
        with pytest.raises(TargetError, match=r"cannot be merged into a .*: its .*`export_adapter\(form='lora'\)`"):
            merge()
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, DPSLayer))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", ORDINARY, ids=str)
@slices
def test_unmerging_is_exact_where_merging_works(kind, granularity):
    model = wrap(kind, granularity).eval()
    train(model)
    expected, before = model.eval()(X), bytes_of(odd_of(model).get_base_layer())
    model.merge_adapter()
    tolerance = 1e-5 if kind.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(model(X), expected, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    assert all(torch.equal(*pair) for pair in zip(before, bytes_of(odd_of(model).get_base_layer()), strict=True))
    assert torch.equal(model(X), expected)


@quantized
def test_an_adapter_goes_from_one_base_to_another(kind, tmp_path):
    model = wrap(kind)
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(kind), tmp_path)
    assert torch.equal(again.eval()(X), model.eval()(X))
    full = PeftModel.from_pretrained(Net(ORDINARY[0]), tmp_path)
    assert torch.equal(*(odd_of(each).get_delta_weight("default") for each in (model, full)))
    full.merge_and_unload()


@quantized
def test_it_can_become_a_lora(kind, tmp_path):
    """The way out that the refusal to merge names."""
    model = wrap(kind)
    train(model)
    delta = odd_of(model).get_delta_weight("default")
    export_adapter(model, tmp_path, form="lora")
    lora = PeftModel.from_pretrained(Net(ORDINARY[0]), tmp_path)
    torch.testing.assert_close(odd_of(lora).get_delta_weight("default"), delta, rtol=1e-6, atol=1e-7)
    _, state = convert_to_lora(model, rank=4)
    factors = {key.rpartition(".lora_")[2]: value for key, value in state.items()}
    torch.testing.assert_close(factors["B.weight"] @ factors["A.weight"], delta, rtol=1e-4, atol=1e-5)


@quantized
def test_copies_of_a_model_train_too(kind):
    model = wrap(kind)
    twin = copy.deepcopy(model)
    assert train(model) == train(twin)


@quantized
def test_all_linear_finds_it(kind):
    model = wrap(kind, target_modules="all-linear")
    names = {name for name, module in model.base_model.model.named_modules() if isinstance(module, DPSLayer)}
    assert names == {"first", "odd", "head"}
    model.add_adapter("other", config(target_modules="all-linear"))
    assert all(
        set(module.dps_delta) == {"default", "other"} for module in model.modules() if isinstance(module, DPSLayer)
    )


def test_all_linear_leaves_out_a_quantized_head(gpt2):
    base = gpt2.base()
    base.set_output_embeddings(Packed(nn.Linear(16, 40, bias=False), "qweight").to(DEVICE))
    for block in base.transformer.h:
        block.mlp.c_fc = Packed(nn.Linear(16, 64), "qweight").to(DEVICE)
    model = get_peft_model(base, config(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name for name, module in model.base_model.model.named_modules() if isinstance(module, DPSLayer)}
    assert "lm_head" not in names
    assert {f"transformer.h.{place}.mlp.c_fc" for place in (0, 1)} <= names
    gpt2.train(model, steps=3)


def test_quantized_layers_of_other_kinds_are_refused():
    base = nn.ModuleDict({"odd": nn.Embedding(8, 8)})
    base["odd"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"'odd' is quantized \(Embedding, torch.int8\). Only linear layers may be"):
        get_peft_model(base, config())


@pytest.fixture
def looking():
    """A score that looks at weights, and was registered as one that does not."""
    register_score("looking", per_unit=True)(lambda context: context.gathered * context.base_weight.float().mean())
    yield "looking"
    SCORES.unregister("looking")


def test_a_score_that_looks_at_the_weight_is_refused(looking):
    model = wrap(QUANTIZED[0], score=looking)
    with pytest.raises(
        TargetError, match=r"score looks at the pretrained weight of a Packed, but its weight is quant"
    ):
        train(model)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
IDS = torch.arange(2, 26).view(2, 12).to(DEVICE)


def train_language(model, steps=10):
    optimizer = optimizer_of(model)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def folder(tmp_path):
    """A saved model, for transformers to quantize on loading."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, intermediate_size=64, **SIZES)).save_pretrained(tmp_path)
    return tmp_path


# PEFT 0.21 switches it on by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_transformers_has_quantized(folder, bits):
    """As with QLoRA: prepared by PEFT, with gradient checkpointing."""
    pytest.importorskip("bitsandbytes")
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": HERE}
    )
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, DPSConfig.compact(units=4, score_steps=2, task_type="CAUSAL_LM"))
    layers = [module for module in model.modules() if isinstance(module, DPSLayer)]
    assert len(layers) == 14
    assert all(layer.unread for layer in layers)
    assert base.is_gradient_checkpointing
    before = [bytes_of(layer.get_base_layer()) for layer in layers]
    losses = train_language(model)
    assert losses[-1] < losses[0]
    assert model.dps_status().engaged
    for layer, one in zip(layers, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, bytes_of(layer.get_base_layer()), strict=True))


def offloaded(gpt2, tmp_path, place="transformer.h.1"):
    """A model of which accelerate keeps some weights on the disk between forwards."""
    gpt2.base().save_pretrained(tmp_path / "base")
    parts = [f"transformer.{part}" for part in ("wte", "wpe", "drop", "h.0", "h.1", "ln_f")]
    places = {**dict.fromkeys([*parts, "lm_head"], HERE), place: "disk"}
    return GPT2LMHeadModel.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()


def compact_gpt2(base, granularity="column", **options):
    options = {"target_modules": ["c_attn", "c_fc", "c_proj"], **options}
    return get_peft_model(base, config(granularity, task_type="CAUSAL_LM", **options)).eval()


@pytest.mark.supports("Base layers", COMPACT, row="kind")
@pytest.mark.parametrize("kind", ["offloaded by accelerate"])
@slices
def test_offloaded_layers_train_as_those_in_memory(gpt2, tmp_path, kind, granularity):
    there = compact_gpt2(offloaded(gpt2, tmp_path), granularity)
    here = compact_gpt2(gpt2.base(), granularity)
    assert [layer.unread for layer in there.modules() if isinstance(layer, DPSLayer)].count(
        "its weight is offloaded"
    ) == 4
    assert train_language(there) == train_language(here)
    trained = {key: value for key, value in here.state_dict().items() if ".dps_" in key}
    assert all(torch.equal(value, there.state_dict()[key]) for key, value in trained.items())
    assert all(
        layer.get_base_layer().weight.is_meta
        for layer in there.modules()
        if isinstance(layer, DPSLayer) and layer.unread
    )
    with pytest.raises(TargetError, match="cannot be merged into a Conv1D: its weight is offloaded"):
        there.merge_adapter()
    here.save_pretrained(tmp_path / "adapter")
    there.load_adapter(tmp_path / "adapter", "other")
    there.set_adapter("other")
    assert torch.equal(gpt2.output(there.eval()), gpt2.output(here.eval()))


@pytest.mark.refuses("Base layers", LORA, "PEFT puts its factors on the meta device, where the weight is", row="kind")
@pytest.mark.parametrize("kind", ["offloaded by accelerate"])
def test_lora_beside_an_offloaded_layer(gpt2, tmp_path, kind):
    model = get_peft_model(offloaded(gpt2, tmp_path), LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    with pytest.raises(RuntimeError, match="meta"):
        train_language(model, steps=1)


@pytest.mark.refuses("Base layers", WHOLE, "their weights exist only during a forward", row="kind")
@pytest.mark.refuses("Base layers", COPY, "their weights exist only during a forward", row="kind")
@pytest.mark.parametrize("kind", ["offloaded by accelerate"])
def test_copies_of_offloaded_layers_are_refused(gpt2, tmp_path, kind):
    base = offloaded(gpt2, tmp_path)
    for options in ({"granularity": "entry", "units": None, "density": 0.5}, {"storage": "copy"}):
        with pytest.raises(TargetError, match=r"'transformer.h.1.attn.c_attn' is offloaded .*only call it"):
            compact_gpt2(base, **options)


def test_offloaded_embeddings_train_too(gpt2, tmp_path):
    there = compact_gpt2(offloaded(gpt2, tmp_path, "transformer.wpe"), target_modules=["wpe"])
    here = compact_gpt2(gpt2.base(), target_modules=["wpe"])
    assert train_language(there) == train_language(here)


def test_biases_of_offloaded_layers_are_refused(gpt2, tmp_path):
    with pytest.raises(TargetError, match=r"bias of a Conv1D, and it is offloaded. Use `train_bias=False`"):
        compact_gpt2(offloaded(gpt2, tmp_path), train_bias=True)


def test_an_offloaded_model_without_its_hooks_is_refused(gpt2, tmp_path):
    compact_gpt2(gpt2.base()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TargetError, match=r"on the meta device.*`load_adapter`"):
        PeftModel.from_pretrained(offloaded(gpt2, tmp_path), tmp_path / "adapter")


def test_a_convolution_that_is_dispatched(tmp_path):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3)).to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    dispatch_model(models[0], {"0": HERE, "1": HERE, "2": "disk"}, main_device=HERE, offload_dir=tmp_path)
    x, results = torch.linspace(-1, 1, 2 * 3 * 49).view(2, 3, 7, 7).cos().to(DEVICE), []
    for model in models:
        model = get_peft_model(model, config(target_modules=["2"], units=2))
        optimizer = optimizer_of(model)
        model.train()
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.base_model.model[2].get_delta_weight("default"))
    assert results[0].count_nonzero()
    assert torch.equal(*results)


tied = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")


@tied
@pytest.mark.supports("Base layers", COMPACT, row="kind")
@pytest.mark.parametrize("kind", ["two targets that share a weight"])
@slices
def test_tied_targets_are_trained_beside_the_weight_that_they_share(gpt2, kind, granularity):
    base = gpt2.base()
    shared = base.lm_head.weight
    before = shared.detach().clone()
    model = compact_gpt2(base, granularity, target_modules=["wte", "lm_head"])
    losses = train_language(model)
    assert losses[-1] < losses[0]
    inner = model.base_model.model
    assert inner.lm_head.get_base_layer().weight is inner.transformer.wte.get_base_layer().weight is shared
    assert torch.equal(shared, before)
    assert all(layer.get_delta_weight("default").any() for layer in (inner.lm_head, inner.transformer.wte))
    expected = gpt2.output(model.eval())
    model.merge_adapter()
    torch.testing.assert_close(gpt2.output(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert inner.lm_head.get_base_layer().weight is inner.transformer.wte.get_base_layer().weight
    assert torch.equal(shared, before)
    assert torch.equal(gpt2.output(model), expected)


@tied
@pytest.mark.supports("Base layers", LORA, row="kind")
@pytest.mark.parametrize("kind", ["two targets that share a weight"])
def test_loras_of_tied_targets(gpt2, kind):
    model = get_peft_model(gpt2.base(), LoraConfig(target_modules=["wte", "lm_head"]))
    losses = train_language(model)
    assert losses[-1] < losses[0]


@tied
@pytest.mark.supports("Base layers", WHOLE, row="kind")
@pytest.mark.refuses("Base layers", COPY, "two copies of one weight would come apart", row="kind")
@pytest.mark.parametrize("kind", ["two targets that share a weight"])
def test_copies_of_tied_targets_are_refused(gpt2, kind):
    with pytest.raises(TargetError, match=r"'transformer\.wte' and 'lm_head' share one weight"):
        compact_gpt2(gpt2.base(), target_modules=["wte", "lm_head"], storage="copy")
    losses = train_language(
        compact_gpt2(gpt2.base(), "entry", target_modules=["wte", "lm_head"], units=None, density=0.1)
    )
    assert losses[-1] < losses[0]


def test_a_module_with_two_names_is_warned_of(caplog):
    base = nn.Module()
    base.first = base.second = nn.Linear(4, 4)
    get_peft_model(base, config(target_modules=["first"]))
    assert "the target 'first' is the same module as 'second', which computes without the adapter" in caplog.text
