"""What only an accelerator shows: waiting for it, its graphs and streams, several devices, fp16 with a scaler."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.optim import SGD, AdamW

from peft_dps import DPSConfig, Stage, unsharded_parameters
from peft_dps.errors import EngineError
from tests.accelerators import (
    assert_engaged,
    everything,
    needs_gpu,
    needs_two_gpus,
    train,
    trainable,
    waits_in,
    weights_of,
)
from tests.device import DEVICE, ON_CPU
from tests.resuming import as_bits, assert_same

pytestmark = pytest.mark.device
VARIANTS = pytest.mark.parametrize("variant", ["dense", "mix"])


@VARIANTS
def test_trainings_do_not_differ_from_run_to_run(case, variant):
    """Masks have to be the same in any case; so are weights here, since torch is told to add up in one order."""
    torch.use_deterministic_algorithms(True)
    try:
        states = []
        for _ in range(2):
            model = case.model(variant=variant)
            optimizer = case.optimizer(model)
            for _ in range(7):
                case.train(model, 1, optimizer)
                states.append(everything(model))
    except RuntimeError as error:
        if "deterministic" not in str(error) or "peft_dps" in str(error):
            raise
        pytest.skip(f"the model itself cannot: {error}")
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(states[:7], states[7:], strict=True):
        assert_same(ours, theirs)


OPTIMIZERS = {
    "fused": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True),
    "foreach": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=True),
    "capturable": lambda parameters: AdamW(parameters, lr=torch.tensor(1e-2), weight_decay=0.1, capturable=True),
    "amsgrad": lambda parameters: AdamW(parameters, lr=1e-2, amsgrad=True, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@VARIANTS
@pytest.mark.parametrize("lean", [False, True])
def test_optimizers_made_for_accelerators(gpt2, optimizer, variant, lean):
    if optimizer == "capturable" and ON_CPU:
        pytest.skip("needs a GPU")
    if optimizer == "sgd" and lean:
        pytest.skip("has no second moment")
    model = gpt2.model(variant=variant, lean=lean)
    made = OPTIMIZERS[optimizer](trainable(model))
    gpt2.train(model, 3, made)
    weights = weights_of(model)
    before = [weight.weight.clone() for weight in weights]
    gpt2.train(model, 1, made)
    for weight, old in zip(weights, before, strict=True):
        frozen = weight.mask.keep == 0
        assert torch.equal(as_bits(weight.weight)[frozen], as_bits(old)[frozen])
        assert not torch.equal(weight.weight, old)
    assert_engaged(model, 4)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@VARIANTS
def test_fp16_with_a_gradient_scaler_that_skips_steps(gpt2, fused, clip, variant):
    model = gpt2.model(variant=variant)
    optimizer = AdamW(trainable(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40, growth_interval=1000)  # overflows at first
    model.train()
    skipped = applied = 0
    while applied < 4:
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = gpt2.output(model).float().square().mean()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        optimizer.zero_grad()
        overflow = scaler.get_scale() < before
        skipped, applied = skipped + overflow, applied + (not overflow)
        assert model.dps_status().steps == applied
        assert skipped < 60
    assert skipped > 0
    assert_engaged(model, 4)
    assert model.dps_status().unscored_steps == 0


@VARIANTS
def test_bf16_with_copies_in_bf16(case, variant):
    model = get_peft_model(case.base().to(torch.bfloat16), case.config(variant=variant), autocast_adapter_dtype=False)
    inputs = case.inputs.to(torch.bfloat16) if case.inputs.is_floating_point() else case.inputs
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1, fused=True)
    model.train()
    for _ in range(4):
        output = model(inputs)
        getattr(output, "logits", output).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_engaged(model, 4)


@needs_gpu
@VARIANTS
@pytest.mark.parametrize("layers", [2, 6])
def test_steps_wait_for_the_device_once_in_accumulate_and_never_in_subnetwork(variant, layers):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).to(DEVICE)
    model = get_peft_model(net, DPSConfig(target_modules=r"\d", variant=variant, density=0.5, stage_steps=4))
    optimizer = AdamW(trainable(model), lr=1e-2, fused=True)
    inputs = torch.randn(4, 16, device=DEVICE)
    waits = [waits_in(lambda: train(model, inputs, 1, optimizer)) for _ in range(12)]
    in_accumulate, in_subnetwork = waits[1:4] + waits[9:12], waits[5:8]
    assert all(len(each) <= 1 for each in in_accumulate), in_accumulate
    assert not any(in_subnetwork), in_subnetwork


@needs_gpu
@VARIANTS
def test_memory_does_not_grow_from_cycle_to_cycle(variant):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)).to(DEVICE)
    model = get_peft_model(net, DPSConfig(target_modules=["0", "2"], variant=variant, density=0.5, stage_steps=2))
    optimizer, inputs = SGD(trainable(model), lr=0.1), torch.randn(4, 256, device=DEVICE)
    live = []
    for _ in range(6):
        train(model, inputs, 4, optimizer)
        live.append(torch.cuda.memory_allocated())
    assert len(set(live[1:])) == 1, live


@needs_gpu
def test_a_whole_step_in_a_cuda_graph_is_refused():
    """A replay runs no Python, so no step would be counted and no subnetwork selected."""
    for steps in (1, 3):
        model, optimizer, inputs = captured_parts(steps)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(EngineError, match="CUDA graph"), torch.cuda.graph(graph):
            train(model, inputs, 1, optimizer)
        assert model.dps_status().steps == steps


def captured_parts(steps, variant="dense"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).to(DEVICE)
    model = get_peft_model(net, DPSConfig(target_modules=["0", "2"], variant=variant, density=0.5, stage_steps=2))
    optimizer = AdamW(trainable(model), lr=torch.tensor(1e-2), capturable=True)
    inputs = torch.randn(4, 16, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(model, inputs, steps, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    return model, optimizer, inputs


@needs_gpu
def test_forward_and_backward_in_a_cuda_graph_train_dense_as_ever():
    graphed, optimizer, inputs = captured_parts(1)
    plain, its_optimizer, _ = captured_parts(1)
    graph = torch.cuda.CUDAGraph()
    for parameter in trainable(graphed):
        parameter.grad = torch.zeros_like(parameter)
    with torch.cuda.graph(graph):
        optimizer.zero_grad(set_to_none=False)
        graphed(inputs).square().mean().backward()
    for _ in range(6):
        graph.replay()
        optimizer.step()
        train(plain, inputs, 1, its_optimizer)
    assert_engaged(graphed, 7)
    for ours, theirs in zip(trainable(graphed), trainable(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_forward_of_mix_in_a_cuda_graph_is_refused():
    """A replay would compute with the noise of the step that was captured, for ever."""
    for steps in (1, 3):
        model, _, inputs = captured_parts(steps, "mix")
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(EngineError, match="CUDA graph"), torch.cuda.graph(graph):
            model(inputs)


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@VARIANTS
@pytest.mark.filterwarnings("ignore")
def test_compiled_for_the_gpu(mlp, variant, mode):
    torch._dynamo.reset()
    model, expected = mlp.model(variant=variant), mlp.model(variant=variant)
    compiled = torch.compile(model, mode=mode)
    mlp.train(expected, 6)
    mlp.train(compiled, 6)
    assert_engaged(model, 6)
    torch.testing.assert_close(mlp.output(model), mlp.output(expected), rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_optimizer_step_is_followed(mlp):
    torch._dynamo.reset()
    model, expected = mlp.model(), mlp.model()
    optimizer, plain = (AdamW(trainable(each), lr=1e-2, weight_decay=0.1) for each in (model, expected))
    step = torch.compile(optimizer.step)
    for _ in range(6):
        mlp.output(model).float().square().mean().backward()
        step()
        optimizer.zero_grad()
        mlp.output(expected).float().square().mean().backward()
        plain.step()
        plain.zero_grad()
    assert_engaged(model, 6)
    torch.testing.assert_close(mlp.output(model), mlp.output(expected), rtol=1e-4, atol=1e-4)


@needs_gpu
@VARIANTS
def test_another_stream_trains_the_same(mlp, variant):
    model, expected = mlp.model(variant=variant), mlp.model(variant=variant)
    mlp.train(expected, 5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mlp.train(model, 5)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(everything(model), everything(expected))


@needs_gpu
@VARIANTS
def test_batches_that_come_from_pinned_memory(mlp, variant):
    """Copied while the host goes on: the step has to wait for them, and nothing else."""
    model, expected = mlp.model(variant=variant), mlp.model(variant=variant)
    optimizer, plain = (SGD(trainable(each), lr=0.1) for each in (model, expected))
    for step in range(6):
        batch = (mlp.inputs.cpu() + step).pin_memory()
        train(model, batch.to(DEVICE, non_blocking=True), 1, optimizer)
        train(expected, mlp.inputs + step, 1, plain)
    assert_engaged(model, 6)
    assert_same(everything(model), everything(expected))


SETTINGS = [
    {},
    {"score": "random"},
    {"scope": "model"},
    {"granularity": "row"},
    {"granularity": "block", "scope": "model"},
    {"offload_base": True},
]


@VARIANTS
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize("default", list(dict.fromkeys(["cpu", "meta", DEVICE.type])))
def test_the_default_device_does_not_matter(mlp, variant, fields, default):
    """Some make the accelerator the default device; "meta" here tells what is made there by mistake."""
    model, expected = mlp.model(variant=variant, **fields), mlp.model(variant=variant, **fields)
    train(expected, mlp.inputs, 5, SGD(trainable(expected), lr=0.1))
    optimizer = SGD(trainable(model), lr=0.1)
    with torch.device(default):  # as `set_default_device` has it, which torch 2.6 cannot undo
        train(model, mlp.inputs, 5, optimizer)
        assert_engaged(model, 5)
        again = copy.deepcopy(model)
        again.load_dps_state_dict(copy.deepcopy(model.dps_state_dict()))
    assert_same(everything(model), everything(expected))
    assert_same(everything(again), everything(expected))


class Apart(nn.Module):
    """Layers on two devices, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        hidden = torch.tanh(self.first(x.to(self.first.weight.device)))
        return self.second(hidden.to(self.second.weight.device))


@VARIANTS
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_weights_on_several_devices(variant, scope, frozen, tmp_path):
    models, found = [], []
    for places in ((DEVICE, DEVICE), (DEVICE, "cpu")):
        torch.manual_seed(0)
        config = DPSConfig(
            target_modules=["first", "second"], variant=variant, scope=scope, frozen=frozen, density=0.4, stage_steps=2
        )
        model = get_peft_model(Apart(), config)
        model.base_model.model.first.to(places[0])
        model.base_model.model.second.to(places[1])
        optimizer = SGD(trainable(model), lr=0.1, momentum=0.9)
        train(model, torch.linspace(-1, 1, 32).view(4, 8), 7, optimizer)
        model.save_dps_state(tmp_path / "state")
        model.load_dps_state(tmp_path / "state")
        if frozen == "exact":
            assert_engaged(model, 7)
        models.append(model)  # keeps its layers alive
        found.append(weights_of(model))
        assert [weight.mask.device.type for weight in found[-1]] == [torch.device(place).type for place in places]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.weight.cpu(), theirs.weight.cpu(), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.mask.keep.cpu(), theirs.mask.keep.cpu())


@needs_two_gpus
@VARIANTS
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_model_that_accelerate_spreads_over_two_gpus(gpt2, variant, scope):
    """The last of them is not torch's current device. Tolerance: none, since each layer computes the same."""
    outputs = []
    for last in ("cuda:0", "cuda:1"):
        places = {f"transformer.{part}": "cuda:0" for part in ("wte", "wpe", "drop", "h.0")}
        places |= {"transformer.h.1": last, "transformer.ln_f": last, "lm_head": "cuda:0"}
        base = dispatch_model(gpt2.base(), places, force_hooks=True)
        model = get_peft_model(base, gpt2.config(variant=variant, scope=scope)).eval()
        gpt2.train(model, 7)
        assert_engaged(model, 7)
        assert {str(weight.weight.device) for weight in weights_of(model)} == {"cuda:0", last}
        outputs.append(gpt2.output(model))
    assert torch.equal(*outputs)


@VARIANTS
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("lean", [False, True])
def test_a_model_goes_to_another_device_in_the_middle(mlp, variant, steps, lean):
    model = mlp.model(variant=variant, lean=lean).to("cpu")
    expected = mlp.model(variant=variant, lean=lean).to("cpu")
    inputs = mlp.inputs.cpu()
    optimizers = [AdamW(trainable(each), lr=1e-2, weight_decay=0.1) for each in (model, expected)]
    train(model, inputs, steps, optimizers[0])
    train(expected, inputs, 9, optimizers[1])
    model.to(DEVICE)
    optimizers[0].load_state_dict(optimizers[0].state_dict())  # which is how an optimizer follows its parameters
    train(model, inputs.to(DEVICE), 5, optimizers[0])
    model.to("cpu")
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    train(model, inputs, 4 - steps, optimizers[0])
    assert_engaged(model, 9)
    for ours, theirs in zip(trainable(model), trainable(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@VARIANTS
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_training_state_goes_to_another_device(mlp, variant, steps, tmp_path):
    model = mlp.model(variant=variant)
    mlp.train(model, steps)
    model.save_dps_state(tmp_path / "state")
    other = mlp.model(variant=variant).to("cpu")
    other.load_state_dict(model.state_dict())
    other.load_dps_state(tmp_path / "state")
    held, expected = everything(other), everything(model)
    assert_same(held, expected)
    train(other, mlp.inputs.cpu(), 4, SGD(trainable(other), lr=0.1))
    assert_engaged(other, steps + 4)


@needs_gpu
@VARIANTS
@pytest.mark.parametrize("fields", [{}, {"offload_base": True}, {"scope": "model"}, {"lean": True}], ids=str)
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "CPUOffloadPolicy"])
def test_fsdp2_on_nccl_with_one_process(alone, variant, fields, offload, tmp_path):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3))
        config = DPSConfig(target_modules=["0", "2", "4"], variant=variant, density=0.4, stage_steps=2, **fields)
        return get_peft_model(net.to(DEVICE), config)

    expected, model = make(), make()
    options = {"offload_policy": CPUOffloadPolicy()} if offload else {}
    options["ignored_params"] = unsharded_parameters(model)
    for name in ("0", "2", "4"):
        fully_shard(model.base_model.model.get_submodule(name), **options)
    fully_shard(model, **options)
    inputs = torch.randn(8, 12, device=DEVICE)
    for each in (expected, model):
        train(each, inputs, 7, AdamW(trainable(each), lr=1e-2, weight_decay=0.1))
        assert_engaged(each, 7)
        assert each.dps_status().stage is Stage.SUBNETWORK
    pairs = zip(weights_of(model), weights_of(expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.weight.cpu(), theirs.weight.cpu(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.mask.keep.cpu(), theirs.mask.keep.cpu())
    model.save_dps_state(tmp_path / "state")
    model.load_dps_state(tmp_path / "state")
    assert_engaged(model, 7)
