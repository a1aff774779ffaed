"""Compact storage on an accelerator: what is trained there, what the host waits for, graphs, scalers and shards."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.optim import SGD, AdamW

from peft_dps import DPSConfig
from peft_dps.errors import EngineError
from tests.accelerators import needs_gpu, train, trainable, waits_in
from tests.compact import TARGETS, Tile, deltas_of, loss_of, make_base, make_batches, make_model
from tests.compact import train as train_on
from tests.device import DEVICE, ON_CPU
from tests.stand_in import PLACE, stand_in

pytestmark = pytest.mark.device
TILE = Tile.__name__.lower()
AGAIN = {"schedule": "every", "score_steps": 2, "stage_steps": 4, "train_bias": False}
ONCE = {"schedule": "once", "score_steps": 2, "train_bias": False}


def trained_on(place: torch.device | str, granularity: str, storage: str) -> dict[str, torch.Tensor]:
    scope = "model" if granularity == "block" else "tensor"
    model = make_model(make_base().cpu(), granularity=granularity, storage=storage, scope=scope, **AGAIN).to(place)
    optimizer = SGD(trainable(model), lr=0.5, momentum=0.9)
    for tokens, labels in make_batches(8):
        optimizer.zero_grad()
        loss_of(model, (tokens.to(place), labels.to(place))).backward()
        optimizer.step()
    status = model.base_model.dps_status()
    assert (status.steps, status.engaged, status.frozen_moved) == (8, True, False)
    layers = model.eval().base_model.model
    return {name: layers.get_submodule(name).weight.detach().cpu() for name in TARGETS}


@pytest.mark.parametrize(
    ("granularity", "storage"),
    [*((unit, "compact") for unit in ("column", "row", "entry", TILE, "block")), ("entry", "copy"), ("row", "copy")],
)
def test_an_accelerator_trains_what_a_cpu_does(granularity, storage):
    """In fp64: sums in another order come within 1e-8, and select the same. Without a GPU the code for it is tried."""
    with stand_in() if ON_CPU else nullcontext():
        found = trained_on(PLACE if ON_CPU else DEVICE, granularity, storage)
    for name, expected in trained_on("cpu", granularity, storage).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-10)


OPTIMIZERS = {
    "fused": lambda parameters: AdamW(parameters, lr=1e-2, fused=True),
    "foreach": lambda parameters: AdamW(parameters, lr=1e-2, foreach=True),
    "capturable": lambda parameters: AdamW(parameters, lr=torch.tensor(1e-2), capturable=True),
    "amsgrad": lambda parameters: AdamW(parameters, lr=1e-2, amsgrad=True, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_optimizers_made_for_accelerators_follows_its_units(optimizer):
    if optimizer == "capturable" and ON_CPU:
        pytest.skip("needs a GPU")
    model, plain = (make_model(make_base(torch.float32), **AGAIN) for _ in range(2))
    pairs = [(model, OPTIMIZERS[optimizer](trainable(model)))]
    pairs.append((plain, AdamW(trainable(plain), lr=1e-2, foreach=False, amsgrad=optimizer == "amsgrad")))
    for batch in make_batches(8):
        for each, own in pairs:
            own.zero_grad()
            loss_of(each, batch).backward()
            own.step()
    for name, delta in deltas_of(model).items():
        expected = deltas_of(plain)[name]
        assert torch.equal(delta.index, expected.index), name
        torch.testing.assert_close(delta.weight, expected.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_with_a_gradient_scaler_that_skips_steps(fused):
    """The factor comes out of the scores, and a step that is skipped brings none."""
    model, expected = (make_model(make_base(torch.float32), **ONCE) for _ in range(2))
    optimizer, batches = AdamW(trainable(model), lr=1e-2, fused=fused), make_batches(1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40, growth_interval=1000)  # overflows at first
    while model.base_model.dps_status().steps < 2:
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = loss_of(model, batches[0])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**40
    sums = {weight.name: weight.sums.total for weight in expected_after(expected, batches[0], steps=2)}
    found = {weight.name: weight.sums.total for weight in controller_of(model).weights}
    for name, total in sums.items():  # fp16 has a mantissa of 10 bits
        torch.testing.assert_close(found[name], total, rtol=0.05, atol=1e-6)
    scaler.scale(loss_of(model, batches[0])).backward()
    scaler.step(optimizer)
    assert model.base_model.dps_status().engaged


def controller_of(model):
    return model.base_model.model.linear.dps_controllers["default"]


def expected_after(model, batch, steps):
    optimizer = SGD(trainable(model), lr=0.1)
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller_of(model).weights


def make_net(layers: int = 3, **fields) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(16, 16), nn.Tanh()))).to(DEVICE)
    names = [str(2 * index) for index in range(layers)]
    defaults = {"storage": "compact", "granularity": "column", "density": 0.25, **ONCE}
    return get_peft_model(net, DPSConfig(**{"target_modules": names, **defaults, **fields}))


def make_inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 64).view(4, 16).to(DEVICE)


def compare(model: nn.Module, expected: nn.Module) -> None:
    assert model.dps_status().engaged
    for ours, theirs in zip(trainable(model), trainable(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("granularity", ["column", "row", "entry", TILE])
@pytest.mark.parametrize("layers", [2, 6])
def test_steps_wait_for_the_device_once_while_they_score_and_never_after_it(granularity, layers):
    model, inputs = make_net(layers, granularity=granularity), make_inputs()
    optimizer = AdamW(trainable(model), lr=1e-2, fused=True)
    waits = [waits_in(lambda: train(model, inputs, 1, optimizer)) for _ in range(6)]
    assert len(waits[1]) <= 1, waits[1]
    assert not any(waits[3:]), waits[3:]


@needs_gpu
def test_memory_does_not_grow_from_selection_to_selection():
    model, inputs = make_net(**AGAIN, max_density=0.5), make_inputs()
    optimizer, live = SGD(trainable(model), lr=0.1), []
    for _ in range(10):
        train(model, inputs, 4, optimizer)
        live.append(torch.cuda.memory_allocated())
    assert max(live[5:]) <= live[4] + 2**12, live


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_cuda_graph_holds_forward_and_backward_once_units_are_selected():
    (graphed, plain), inputs = (make_net() for _ in range(2)), make_inputs()
    optimizers = [AdamW(trainable(each), lr=torch.tensor(1e-2), capturable=True) for each in (graphed, plain)]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(graphed, inputs, 1, optimizers[0])
        with pytest.raises(EngineError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            graphed(inputs)
        train(graphed, inputs, 3, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    train(plain, inputs, 4, optimizers[1])
    for parameter in trainable(graphed):
        parameter.grad = torch.zeros_like(parameter)
    with torch.cuda.graph(graph):
        optimizers[0].zero_grad(set_to_none=False)
        graphed(inputs).square().mean().backward()
    for _ in range(6):
        graph.replay()
        optimizers[0].step()
        train(plain, inputs, 1, optimizers[1])
    compare(graphed, plain)


@needs_gpu
@pytest.mark.parametrize("granularity", ["column", "row", TILE])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_for_the_gpu(granularity, mode):
    torch._dynamo.reset()
    (model, expected), inputs = (make_net(granularity=granularity) for _ in range(2)), make_inputs()
    compiled = torch.compile(model, mode=mode)
    train(expected, inputs, 7, SGD(trainable(expected), lr=0.1))
    train(compiled, inputs, 7, SGD(trainable(model), lr=0.1))
    compare(model, expected)


@pytest.mark.parametrize("granularity", ["column", "row", "entry", TILE])
@pytest.mark.parametrize("default", list(dict.fromkeys(["meta", DEVICE.type])))
def test_the_default_device_does_not_matter(granularity, default):
    """Some make the accelerator the default device; "meta" here tells what is made there by mistake."""
    (model, expected), batches = (make_model(granularity=granularity, **AGAIN) for _ in range(2)), make_batches(8)
    optimizer, plain = (SGD(trainable(each), lr=0.1, momentum=0.9) for each in (model, expected))
    train_on(expected, plain, batches)
    with torch.device(default):  # as `set_default_device` has it, which torch 2.6 cannot undo
        train_on(model, optimizer, batches)
    compare(model.base_model, expected.base_model)


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_channels_last_trains_the_same(granularity):
    """Tolerance 1e-6: a convolution may add up in another order."""
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3)).to(DEVICE, memory_format=memory_format)
        fields = {"storage": "compact", "granularity": granularity, "density": 0.5, **AGAIN}
        model = get_peft_model(net, DPSConfig(target_modules=["0", "2"], **fields))
        inputs = torch.linspace(-1, 1, 288).view(2, 4, 6, 6).sin().to(DEVICE, memory_format=memory_format)
        train(model, inputs, 9, SGD(trainable(model), lr=0.1))
        assert model.dps_status().engaged
        weights.append([model.base_model.model[place].weight.detach() for place in (0, 2)])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@needs_gpu
def test_another_stream_trains_the_same():
    (model, expected), inputs = (make_net(**AGAIN) for _ in range(2)), make_inputs()
    train(expected, inputs, 9, SGD(trainable(expected), lr=0.1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(model, inputs, 9, SGD(trainable(model), lr=0.1))
    torch.cuda.current_stream().wait_stream(side)
    compare(model, expected)


@needs_gpu
@pytest.mark.parametrize("granularity", ["column", "row"])
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "CPUOffloadPolicy"])
def test_fsdp2_on_nccl_with_one_process(alone, granularity, offload):
    (expected, model), inputs = (make_net(granularity=granularity) for _ in range(2)), make_inputs()
    options = {"offload_policy": CPUOffloadPolicy()} if offload else {}
    for name in ("0", "2", "4"):
        fully_shard(model.base_model.model.get_submodule(name), **options)
    fully_shard(model, **options)
    for each in (expected, model):
        train(each, inputs, 7, AdamW(trainable(each), lr=1e-2))
        assert each.dps_status().engaged
    for name in ("0", "2", "4"):
        ours, theirs = (each.base_model.model.get_submodule(name).dps_delta["default"] for each in (model, expected))
        assert torch.equal(ours.index, theirs.index)
        torch.testing.assert_close(ours.values().to(DEVICE), theirs.values(), rtol=1e-5, atol=1e-6)
