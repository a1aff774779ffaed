from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_dps import DPSConfig, Stage
from peft_dps.errors import EngineError
from peft_dps.masking.effective_linear import effective_linear
from peft_dps.masking.effective_weight import AmplifiedWeight, NoisyWeight
from peft_dps.masking.mask import Mask
from peft_dps.masking.noise import ColumnNoise, Participation
from tests.device import DEVICE
from tests.reference import ReferenceMix
from tests.unit.conftest import controller_of, keep_of, layers_of, train, trainable, weights_of

pytestmark = pytest.mark.device


def mix(make_model, **fields):
    return make_model(**{"variant": "mix", "density": 0.6, "stage_steps": 3, **fields})


@pytest.mark.parametrize("frozen", ["exact", "gradient"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("decay", [False, True])
def test_training_follows_the_reference(make_model, make_net, batches, frozen, scope, decay):
    fields = {"density": 0.6, "stage_steps": 3, "scope": scope, "frozen": frozen}
    sizes = (12, 7, 9, 3)
    model = mix(make_model, sizes=sizes, participation_decay=decay, seed=5, **fields)
    plain = make_net(sizes=sizes)
    noise = ColumnNoise(0.6, 5)
    reference = ReferenceMix(
        [layer.weight for layer in plain.layers],
        draw=lambda step: [row.float() for row in noise.draw(step, sizes[:-1], DEVICE)],
        decay=decay,
        **fields,
    )
    ours, theirs = AdamW(trainable(model), lr=1e-2), AdamW(plain.parameters(), lr=1e-2)
    for x, y in batches(14):
        train(model, ours, [(x, y)])
        theirs.zero_grad()
        hidden = x
        for index, (weight, layer) in enumerate(zip(reference.effective(), plain.layers, strict=True)):
            hidden = nn.functional.linear(torch.tanh(hidden) if index else hidden, weight, layer.bias)
        nn.functional.cross_entropy(hidden, y).backward()
        reference.before_step()
        theirs.step()
        reference.after_step()
        for tracked, layer, mask in zip(
            controller_of(model).weights, plain.layers, reference.masks or [None] * 3, strict=True
        ):
            torch.testing.assert_close(tracked.weight.detach(), layer.weight.detach(), rtol=0, atol=1e-6)
            if keep_of(tracked) is not None:
                assert torch.equal(keep_of(tracked).bool(), mask)


@pytest.mark.parametrize(("stage_steps", "decays"), [(49, False), (50, True)])
def test_decay_starts_at_fifty_steps(make_model, batches, monkeypatch, stage_steps, decays):
    relax, relaxed = Participation.relax_, []

    def watched(self, evidence, weight, steps):
        gathered, times = evidence.clone(), self.count
        relax(self, evidence, weight, steps)
        factor = torch.exp(-times / stage_steps) if decays else 1.0
        relaxed.append((evidence.clone(), gathered / times.clamp(min=1) * factor))

    monkeypatch.setattr(Participation, "relax_", watched)
    model = mix(make_model, stage_steps=stage_steps)
    train(model, SGD(trainable(model), lr=0.1), batches(stage_steps))
    model(batches(1)[0][0])  # selects
    assert len(relaxed) == 2
    for ours, expected in relaxed:
        torch.testing.assert_close(ours, expected)


def test_the_mean_of_the_effective_weight_is_the_weight():
    weight, base = (torch.randn(5, 40, dtype=torch.float64, device=DEVICE) for _ in range(2))
    draws, density = 20_000, 0.7
    noise = ColumnNoise(density)
    total = torch.zeros_like(weight)
    for step in range(draws):
        columns = noise.draw(step, [40], DEVICE)[0].double()
        total += NoisyWeight(base, columns, density).of(weight)
    # The variance of b / density is (1 - density) / density; 200 means stay within 4.5 standard errors but for
    # about one run in 700, and this one is seeded.
    error = (weight - base).abs() * ((1 - density) / density / draws) ** 0.5
    assert ((total / draws - weight).abs() <= 4.5 * error).all()


def test_noise_is_fair_and_independent_over_columns_weights_steps_and_seeds():
    noise = ColumnNoise(0.7)
    rows = torch.stack([torch.cat(noise.draw(step, [300, 300], DEVICE)).float() for step in range(2000)]).cpu()
    assert abs(rows.mean().item() - 0.7) < 0.002
    correlation = torch.corrcoef(rows.T)
    correlation.fill_diagonal_(0)
    assert correlation.std() == pytest.approx(2000**-0.5, rel=0.05)
    assert correlation.abs().max() < 5.5 * 2000**-0.5
    follow = ((rows[1:] - 0.7) * (rows[:-1] - 0.7)).mean(0) / 0.21
    assert follow.abs().max() < 5 * 2000**-0.5
    other = torch.cat(ColumnNoise(0.7, 1).draw(0, [300, 300], DEVICE)).float().cpu()
    assert (other != rows[0]).float().mean() == pytest.approx(0.42, abs=0.08)


def test_noise_ignores_the_users_random_numbers(make_model, batches):
    first, second = mix(make_model), mix(make_model)
    optimizers = [SGD(trainable(model), lr=0.1) for model in (first, second)]
    for batch in batches(8):
        train(first, optimizers[0], [batch])
        torch.manual_seed(int(torch.randint(10_000, (1,))))
        torch.rand(17)
        train(second, optimizers[1], [batch])
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))
    other = mix(make_model, seed=1)
    train(other, SGD(trainable(other), lr=0.1), batches(8))
    assert not torch.equal(weights_of(first)[0], weights_of(other)[0])


def test_a_copy_goes_on_with_the_same_noise(make_model, batches):
    for steps in (1, 4):
        model = mix(make_model)
        optimizer = SGD(trainable(model), lr=0.1)
        train(model, optimizer, batches(steps))
        twin = copy.deepcopy(model)
        train(model, optimizer, batches(8))
        train(twin, SGD(trainable(twin), lr=0.1), batches(8))
        assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(twin), strict=True))


def effective_weights(weight):
    generator = torch.Generator().manual_seed(0)
    columns = (torch.rand(weight.shape[1], generator=generator) < 0.6).to(weight)
    base = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    mask = (torch.rand(weight.shape, generator=generator) < 0.6).to(weight.device)
    yield NoisyWeight(base, columns, 0.6), lambda w: base + columns * (w - base) / 0.6, columns
    yield AmplifiedWeight(base, 0.6, Mask.of(mask.clone())), lambda w: base + mask * (w - base) / 0.6, mask
    yield AmplifiedWeight(base, 0.6), lambda w: base + (w - base) / 0.6, 1.0


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("input_axis", [0, 1])
def test_gradients_are_the_formulas_in_float64(kind, input_axis):
    stored = torch.randn(5, 8, dtype=torch.float64, requires_grad=True, device=DEVICE)
    effective, formula, factor = list(effective_weights(stored))[kind]
    if input_axis == 0 and kind == 0:
        columns = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64, device=DEVICE).unsqueeze(1)
        base = effective.base_weight
        effective = NoisyWeight(base, columns, 0.6)
        formula, factor = lambda w: base + columns * (w - base) / 0.6, columns
    inputs = stored.shape[input_axis]
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True, device=DEVICE)
    bias = torch.randn(stored.shape[1 - input_axis], dtype=torch.float64, requires_grad=True, device=DEVICE)
    output = effective_linear(x, stored, bias, effective, input_axis=input_axis)
    dense = formula(stored.detach()).requires_grad_()
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    expected = nn.functional.linear(x2, dense if input_axis == 1 else dense.t(), bias2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(output)
    output.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, bias2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stored.grad, dense.grad * factor, rtol=1e-12, atol=1e-12)


class ShapesOfProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::mm", "aten::mm.out"):
            self.seen.add(tuple(tuple(factor.shape) for factor in args[:2]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("input_axis", [0, 1])
def test_products_have_few_shapes_whatever_the_noise(input_axis):
    """A new shape is a new kernel to oneDNN, which keeps it: one for every draw fills the memory."""
    weight = torch.randn(16, 512, device=DEVICE) if input_axis == 1 else torch.randn(512, 16, device=DEVICE)
    weight.requires_grad_()
    generator, kept = torch.Generator().manual_seed(0), set()
    with ShapesOfProducts() as products:
        for _ in range(60):
            columns = (torch.rand(512, generator=generator) < 0.7).to(DEVICE)
            kept.add(int(columns.sum()))
            noise = columns.float() if input_axis == 1 else columns.float().unsqueeze(1)
            effective = NoisyWeight(torch.zeros_like(weight), noise, 0.7)
            effective_linear(
                torch.ones(3, 512, device=DEVICE), weight, None, effective, input_axis=input_axis
            ).sum().backward()
    assert len(kept) > 20
    assert len(products.seen) <= 6  # three of the gradient's, and those of the forward


def test_an_infinite_gradient_leaves_other_columns_at_zero():
    weight = torch.randn(4, 6, requires_grad=True, device=DEVICE)
    effective = NoisyWeight(torch.zeros(4, 6, device=DEVICE), torch.tensor([1.0, 0, 1, 1, 0, 1], device=DEVICE), 0.6)
    effective_linear(torch.ones(3, 6, device=DEVICE), weight, None, effective, input_axis=1).backward(
        torch.full((3, 4), torch.inf, device=DEVICE)
    )
    assert weight.grad[:, [1, 4]].eq(0).all()
    assert weight.grad[:, [0, 2, 3, 5]].isinf().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_of_other_columns_is_zero_whatever_it_was(value):
    """Where it is made for all columns, as on an accelerator and of layers that are no linear ones."""
    columns = torch.tensor([1.0, 0, 1, 1, 0, 1], device=DEVICE)
    gradient = NoisyWeight(columns, columns, 0.6).gradient_(torch.full((4, 6), value, device=DEVICE))
    assert torch.equal(gradient.eq(0), columns.eq(0).expand(4, 6))


def test_nothing_of_a_weights_size_is_kept_for_backward_but_the_weight_itself(make_model, batches):
    model = mix(make_model, sizes=(64, 64, 64))
    optimizer = SGD(trainable(model), lr=0.1)
    x = torch.randn(4, 64, device=DEVICE)
    for _ in range(5):  # both stages
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            loss = model(x).square().mean()
        weights = {weight.data_ptr() for weight in weights_of(model)}
        assert {t.data_ptr() for t in kept if t.numel() >= 64 * 64} == weights
        del loss
        train(model, optimizer, [(x, torch.zeros(4, dtype=torch.long, device=DEVICE))])
    assert controller_of(model).stage is Stage.SUBNETWORK


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_noise(make_model, batches, reentrant):
    plain, recomputing = mix(make_model), mix(make_model)
    first, second = (SGD(trainable(model), lr=0.1) for model in (plain, recomputing))
    for x, y in batches(9):
        x = x.clone().requires_grad_()
        train(plain, first, [(x, y)])
        second.zero_grad()
        output = checkpoint(recomputing, x, use_reentrant=reentrant)
        nn.functional.cross_entropy(output, y).backward()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(recomputing), strict=True))


def test_checkpointing_with_optimizers_that_step_in_backward(make_model, batches):
    plain, recomputing = mix(make_model, sizes=(12, 12, 12, 3)), mix(make_model, sizes=(12, 12, 12, 3))
    optimizer = SGD(trainable(plain), lr=0.1)
    for parameter in trainable(recomputing):
        own = SGD([parameter], lr=0.1)

        def step_now(_, own=own):
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(step_now)
    for x, y in batches(9):
        train(plain, optimizer, [(x, y)])
        hidden = x.clone().requires_grad_()
        for index, layer in enumerate(layers_of(recomputing)):
            hidden = checkpoint(layer, torch.tanh(hidden) if index else hidden, use_reentrant=False)
        nn.functional.cross_entropy(hidden, y).backward()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(recomputing), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled_training_equals_eager(make_model, batches):
    torch._dynamo.reset()
    plain, compiled = mix(make_model), mix(make_model)
    first, second = (SGD(trainable(model), lr=0.1) for model in (plain, compiled))
    fast = torch.compile(compiled, backend="aot_eager")
    for batch in batches(9):
        train(plain, first, [batch])
        train(fast, second, [batch])
    for a, b in zip(weights_of(plain), weights_of(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert compiled.dps_status() == plain.dps_status()


def test_several_forwards_of_a_step_share_the_noise_and_count_once(make_model, batches):
    whole, split = mix(make_model), mix(make_model)
    first, second = (SGD(trainable(model), lr=0.1) for model in (whole, split))
    for x, y in batches(3):
        train(whole, first, [(x, y)])
        second.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (nn.functional.cross_entropy(split(x[part]), y[part]) / 2).backward()
        second.step()
    for one, two in zip(controller_of(whole).weights, controller_of(split).weights, strict=True):
        assert torch.equal(one.noise.count, two.noise.count)
        assert one.noise.count.max() <= 3
        torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-6)


def test_a_layer_called_twice_sees_one_effective_weight(make_model):
    model = mix(make_model, sizes=(6, 6))
    layer = layers_of(model)[0]
    model.train()
    x = torch.randn(3, 6, device=DEVICE)
    assert torch.equal(layer(x), layer(x))
    layer(layer(x)).sum().backward()
    assert torch.isfinite(weights_of(model)[0].grad).all()


def test_evaluation_uses_the_weight_itself_in_both_stages(make_model, batches):
    model = mix(make_model)
    optimizer = SGD(trainable(model), lr=0.5)
    x = batches(1)[0][0]
    for batch in batches(6):
        train(model, optimizer, [batch])
        weight, bias = weights_of(model)[0], layers_of(model)[0].dps_bias["default"]
        expected = nn.functional.linear(x, weight, bias)
        noisy = layers_of(model)[0](x)
        model.eval()
        assert torch.equal(layers_of(model)[0](x), expected)
        model.train()
        if model.dps_status().steps not in (3, 6):  # the first forward of SUBNETWORK still has W = T
            assert not torch.equal(noisy, expected)


def test_autocast_and_half_precision_bases(make_net, make_model, batches):
    config = {"variant": "mix", "density": 0.6, "stage_steps": 3, "target_modules": ["layers.0", "layers.1"]}
    half = get_peft_model(make_net().to(torch.bfloat16), DPSConfig(**config))
    full = mix(make_model)
    x, y = batches(1)[0]
    for model, inputs in ((half, x.to(torch.bfloat16)), (full, x)):
        optimizer = SGD(trainable(model), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=model is full):
                output = model(inputs)
                assert output.dtype is torch.bfloat16
                loss = nn.functional.cross_entropy(output.float(), y)
            loss.backward()
            assert all(weight.grad.dtype is torch.float32 for weight in weights_of(model))
            optimizer.step()
        assert model.dps_status().stage is Stage.SUBNETWORK
        assert not model.dps_status().frozen_moved


def test_conv1d_draws_noise_over_its_inputs(batches):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Conv1D(5, 12)

        def forward(self, x):
            return self.layer(x)

    model = get_peft_model(
        Model().to(DEVICE), DPSConfig(target_modules=["layer"], variant="mix", density=0.5, stage_steps=2)
    )
    layer = model.base_model.model.layer
    optimizer = SGD(trainable(model), lr=0.1)
    model(batches(1)[0][0]).square().mean().backward()
    row = layer.dps_controllers["default"].weights[0].noise.drawn
    assert row.shape == (12,)
    assert (layer.dps_weight["default"].grad[~row] == 0).all()
    optimizer.step()
    train_on = [(x, y) for x, y in batches(3)]
    train(model, optimizer, train_on)
    assert not model.dps_status().frozen_moved


def test_modules_that_read_the_weight_see_the_noise():
    attention = nn.MultiheadAttention(8, 2).to(DEVICE)
    model = nn.Sequential()
    model.attention = attention
    model = get_peft_model(
        model, DPSConfig(target_modules=["attention.out_proj"], variant="mix", density=0.5, stage_steps=2)
    )
    layer = model.base_model.model.attention.out_proj
    with torch.no_grad():
        layer.dps_weight["default"].add_(1.0)
    model.train()
    columns_off = ~noise_row(layer)
    read = layer.weight
    assert torch.equal(read[:, columns_off], layer.base_layer.weight[:, columns_off])
    read.sum().backward()
    assert (layer.dps_weight["default"].grad[:, columns_off] == 0).all()
    assert (layer.dps_weight["default"].grad[:, ~columns_off] == 1).all()
    model.eval()
    assert torch.equal(layer.weight, layer.dps_weight["default"])


def test_a_frozen_entry_changed_from_outside_is_not_amplified(make_model, batches):
    model = mix(make_model)
    train(model, SGD(trainable(model), lr=0.1), batches(5))
    tracked = controller_of(model).weights[0]
    layer, frozen = layers_of(model)[0], keep_of(tracked) == 0
    with torch.no_grad():
        tracked.weight[frozen] += 1.0
    before = tracked.frozen.snapshot[frozen]
    assert frozen.any()
    assert torch.equal(layer.train().weight[frozen], before)
    assert torch.equal(
        layer(torch.eye(layer.in_features, device=DEVICE)).t()[frozen], before + layer.bias[frozen.nonzero()[:, 0]]
    )


def noise_row(layer):
    return ColumnNoise(0.5).draw(1, [8], DEVICE)[0]


def test_density_one_is_bitwise_plain_fine_tuning(make_model, make_net, batches):
    model, plain = mix(make_model, density=1.0), make_net()
    ours, theirs = AdamW(trainable(model), lr=1e-2), AdamW(plain.parameters(), lr=1e-2)
    for batch in batches(8):
        train(model, ours, [batch])
        train(plain, theirs, [batch])
    assert all(torch.equal(a, layer.weight) for a, layer in zip(weights_of(model), plain.layers, strict=True))


def test_a_step_without_a_training_forward_counts_every_column(make_model, batches):
    model = mix(make_model, stage_steps=5)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(1))
    before = [weight.noise.count.clone() for weight in controller_of(model).weights]
    model.eval()
    train(model, optimizer, batches(1))
    for weight, counts in zip(controller_of(model).weights, before, strict=True):
        assert torch.equal(weight.noise.count, counts + 1)


def test_a_snapshot_is_the_only_copy_in_subnetwork(make_model, batches):
    for frozen in ("exact", "gradient"):
        model = mix(make_model, frozen=frozen)
        train(model, SGD(trainable(model), lr=0.1), batches(4))
        for weight in controller_of(model).weights:
            parts = (weight, weight.gathered, weight.noise, weight.frozen)
            kept = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
            assert [each for each in kept if each.dim() > 0] == [weight.frozen.snapshot]


def test_the_papers_settings_put_everything_under_training(make_net):
    from transformers import BertConfig, BertForSequenceClassification

    base = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    total = sum(parameter.numel() for parameter in base.parameters())
    for variant in ("dense", "mix"):
        config = DPSConfig.from_paper(variant, total_steps=40)
        assert (config.variant, config.frozen, config.density, config.stage_steps) == (variant, "gradient", 0.7, 0.05)
        model = get_peft_model(copy.deepcopy(base), config)
        layers = model.dps_status().layers
        assert {"bert.pooler.dense", "classifier"} <= set(layers)
        assert sum(parameter.numel() for parameter in trainable(model)) == total
    assert DPSConfig.from_paper(density=0.3).density == 0.3


def test_adapters_that_are_not_trained_get_no_noise(make_model, batches):
    model = mix(make_model, stage_steps=0.1)
    model.requires_grad_(False)
    with torch.no_grad():
        weights_of(model)[0].add_(1.0)
    x = batches(1)[0][0]
    assert torch.equal(model.train()(x), model.eval()(x))


def test_copies_of_layers_that_nobody_tracks_are_refused_by_name(make_model, batches):
    model = mix(make_model)
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    replica = copy.copy(layers_of(model)[0])  # shares its subnetwork, as DataParallel's replicas do
    with pytest.raises(EngineError, match="DistributedDataParallel"):
        replica(batches(1)[0][0])


def test_a_forward_after_a_stage_leaves_its_status_true(make_model, batches):
    model = mix(make_model, stage_steps=2)
    train(model, SGD(trainable(model), lr=0.1), batches(4))
    x, _ = batches(1)[0]
    model(x)  # of the next ACCUMULATE stage already: noisy
    assert controller_of(model).weights[0].noise.drawn is not None
    assert model.dps_status().stage is Stage.SUBNETWORK
    assert not model.dps_status().frozen_moved
    weight = controller_of(model).weights[0]
    with torch.no_grad():
        weight.weight.view(-1)[(keep_of(weight).view(-1) == 0).nonzero()[0]] += 1e-3
    assert model.dps_status().frozen_moved


def test_a_layer_in_eval_mode_counts_every_column(make_model, batches):
    model = mix(make_model, stage_steps=20)
    optimizer = SGD(trainable(model), lr=0.1)
    layers_of(model)[0].eval()
    train(model, optimizer, batches(6))
    first, second = (weight.noise.count for weight in controller_of(model).weights)
    assert torch.equal(first, torch.full_like(first, 6.0))
    assert (second < 6).any()


def test_a_training_in_eval_mode_is_warned_of_once(make_model, batches, caplog):
    model = mix(make_model, stage_steps=1)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(2))
    assert not caplog.text
    model.eval()
    train(model, optimizer, batches(6))
    assert caplog.text.count("without any forward in training mode") == 1


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_a_forward_between_two_optimizers_of_a_step(make_model, batches, variant):
    model = mix(make_model, variant=variant)
    one, other = ([parameter] for parameter in weights_of(model))
    optimizers = [SGD(parameters, lr=0.1) for parameters in (one, other)]

    def alternate():
        for batch in batches(4):
            for optimizer in optimizers:
                x, y = batch
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                model.zero_grad()

    if variant == "dense":
        alternate()
        assert model.dps_status().steps == 4
        return
    with pytest.raises(EngineError, match="another optimizer of step 1, and there was a training forward"):
        alternate()


@pytest.mark.parametrize(("density", "times"), [(1e-6, 0.0), (1 - 1e-6, 1.0)])
def test_noise_has_the_density_with_which_the_training_began(make_model, batches, density, times):
    model = mix(make_model, density=density, stage_steps=20)
    model.peft_config["default"].density = 1 - density  # of whatever is made with the config from now on
    train(model, SGD(trainable(model), lr=0.1), batches(1))
    for weight in controller_of(model).weights:
        assert torch.equal(weight.noise.count, torch.full_like(weight.noise.count, times))


@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_a_resumed_training_can_be_copied_in_subnetwork(make_model, batches, frozen):
    model, resumed = mix(make_model, frozen=frozen), mix(make_model, frozen=frozen)
    optimizer = SGD(trainable(model), lr=0.1)
    train(model, optimizer, batches(4))
    resumed.load_state_dict(model.state_dict())
    resumed.load_dps_state_dict(model.dps_state_dict())
    copied = copy.deepcopy(resumed)
    assert not any(tensor.requires_grad for tensor in copy.deepcopy(resumed.dps_state_dict())["tensors"].values())
    for each in (resumed, copied, model):
        train(each, SGD(trainable(each), lr=0.1), batches(5)[4:])
    for ours, theirs, copies in zip(*map(weights_of, (model, resumed, copied)), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, copies)
