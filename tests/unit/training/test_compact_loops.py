"""Compact storage in every kind of loop: evidence is the sum over passes of squared gradients of whole weights."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dps import DPSConfig, dps_adapter
from peft_dps.errors import ConfigError, EngineError, ScoreError
from tests import needs
from tests.unit.conftest import Net, controller_of, layers_of, trainable

STEPS = 3
LAYERS = ("layers.0", "layers.1", "layers.2")
SIZES = (12, 16, 8, 3)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Checkpointed(Net):
    """Computes each layer again in the backward pass."""

    reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(self._run(layer, x))
        return self._run(self.layers[-1], x)

    def _run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return layer(x)
        # Reentrant checkpointing needs an input with a gradient.
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(layer, x, use_reentrant=self.reentrant)


@pytest.fixture
def make():
    def make(**fields):
        torch.manual_seed(0)
        net = Checkpointed(SIZES).double()
        plain = {"target_modules": list(LAYERS), "storage": "compact", "schedule": "once", "score_steps": STEPS}
        fields = {"granularity": "column", "train_bias": False, "density": 0.25, **fields}
        return get_peft_model(net, DPSConfig(**{**plain, **fields}))

    return make


@pytest.fixture
def data():
    def data(count, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(8, 12, generator=generator).double(), torch.randint(3, (8,), generator=generator))
            for _ in range(count)
        ]

    return data


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def squares(passes, factor=1.0):
    """Squared gradients of the whole pretrained weights, added up over passes, one at a time."""
    torch.manual_seed(0)
    net = Net(SIZES).double()
    sums = [torch.zeros_like(layer.weight) for layer in net.layers]
    for batch in passes:
        net.zero_grad()
        (loss_of(net, batch) * factor).backward()
        for total, layer in zip(sums, net.layers, strict=True):
            total += layer.weight.grad.square()
    return sums


def evidence_of(model):
    return [weight.gathered.total for weight in controller_of(model).weights]


def assert_evidence(model, expected, rtol=1e-9):
    for total, sums in zip(evidence_of(model), expected, strict=True):
        torch.testing.assert_close(total, sums.sum(0), rtol=rtol, atol=0)


def assert_selected(model, expected):
    for layer, sums in zip(layers_of(model), expected, strict=True):
        index = layer.dps_delta["default"].index
        best = sums.sum(0).topk(len(index)).indices
        assert set(index.tolist()) == set(best.tolist())


def step(model, optimizer, batches, factor=1.0, clip=None):
    for batch in batches:
        (loss_of(model, batch) * factor).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(trainable(model), clip)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("micro", [1, 2])
def test_evidence_is_that_of_each_pass(make, data, reentrant, micro):
    model, batches = make(), data(micro * STEPS)
    model.base_model.model.reentrant = reentrant
    optimizer = AdamW(trainable(model), lr=1e-2)
    for start in range(0, len(batches), micro):
        step(model, optimizer, batches[start : start + micro], 1 / micro, clip=1e-3)
    expected = squares(batches, 1 / micro)
    assert_evidence(model, expected)
    step(model, optimizer, data(1, seed=2))
    assert_selected(model, expected)
    assert model.dps_status().unscored_steps == 0


@pytest.mark.parametrize("granularity", ["row", "entry", "tensor"])
def test_evidence_of_other_units(make, data, granularity):
    model, batches = make(granularity=granularity), data(STEPS)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for batch in batches:
        step(model, optimizer, [batch])
    expected = squares(batches)
    for total, sums in zip(evidence_of(model), expected, strict=True):
        wanted = {"row": sums.sum(1), "entry": sums, "tensor": sums.sum().view(1)}[granularity]
        torch.testing.assert_close(total, wanted.to(total.dtype), rtol=1e-5, atol=0)
    step(model, optimizer, data(1, seed=2))
    assert model.dps_status().engaged


def test_closures_and_several_optimizers_make_one_step(make, data):
    expected = squares(data(STEPS))
    closed = make()
    optimizer = SGD(trainable(closed), lr=1e-2)
    for batch in data(STEPS):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(closed, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_evidence(closed, expected)

    several = make()
    optimizers = [AdamW([parameter], lr=1e-2) for parameter in trainable(several)]
    assert len(optimizers) == len(LAYERS)
    for batch in data(STEPS):
        loss_of(several, batch).backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert several.dps_status().steps == STEPS
    assert_evidence(several, expected)


def test_an_accelerate_loop(make, data):
    model, batches = make(), data(2 * STEPS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(batches, batch_size=None)
    prepared, optimizer, loader = accelerator.prepare(model, AdamW(trainable(model), lr=1e-2), loader)
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, batch))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert model.dps_status().steps == STEPS
    assert_evidence(model, squares(batches, 0.5))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_factor_of_a_gradient_scaler_is_divided_out(make, data, fused, unscale):
    model, batches = make().float(), data(STEPS)
    optimizer = AdamW(trainable(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for x, y in batches:
        scaler.scale(loss_of(model, (x.float(), y))).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2048.0  # it has grown in between
    assert_evidence(model, squares(batches), rtol=1e-4)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_leaves_no_evidence(make, data, set_to_none, fused):
    """Without `set_to_none` the step after it is left out, too: their passes cannot be told apart."""
    model, batches = make(train_bias=True).float(), data(STEPS + 3)
    optimizer = AdamW(trainable(model), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, (x, y) in enumerate(batches):
        scaler.scale(loss_of(model, (x.float(), y))).backward()
        if number == 1:
            layers_of(model)[2].dps_bias["default"].grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)
        if model.dps_status().steps == STEPS:
            break
    assert number == STEPS
    scored = [0, 2, 3] if set_to_none else [0, 3]
    assert model.dps_status().unscored_steps == STEPS - len(scored)
    assert_evidence(model, squares([batches[place] for place in scored]), rtol=1e-4)


def test_a_scaler_notices_that_whole_gradients_overflow(make, data):
    """What is trained has no gradient of its own yet, by which the scaler would find a scale that fits."""
    model, batches = make().float(), data(40)
    optimizer = AdamW(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    used = []
    for x, y in batches:
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x.float()).float(), y)
        scaler.scale(loss).backward()
        before = model.dps_status().steps
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if model.dps_status().steps > before:
            used.append((x, y))
        if len(used) == STEPS:
            break
    assert scaler.get_scale() < 2.0**24
    assert model.dps_status().unscored_steps == 0
    assert_evidence(model, squares(used), rtol=0.05)


def test_gradients_that_are_thrown_away_are_no_evidence(make, data):
    model, (lost, *batches) = make(), data(STEPS + 1)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for batch in batches:
        loss_of(model, lost).backward()
        optimizer.zero_grad()
        step(model, optimizer, [batch])
    assert_evidence(model, squares(batches))


def test_steps_that_are_not_finite_are_counted_and_reported(make, data, caplog):
    model, batches = make(), data(STEPS)
    batches[1][0][0, 0] = float("nan")
    optimizer = AdamW(trainable(model), lr=1e-2)
    with caplog.at_level(logging.WARNING):
        for batch in batches:
            step(model, optimizer, [batch])
    assert "step 2 are not finite" in caplog.text
    assert model.dps_status().unscored_steps == 1
    assert all(parameter.isfinite().all() for parameter in trainable(model))
    assert_evidence(model, squares([batches[0], batches[2]]))
    step(model, optimizer, data(1, seed=2))
    assert model.dps_status().engaged


def test_no_finite_step_is_an_error(make, data):
    model = make()
    optimizer = AdamW(trainable(model), lr=1e-2)
    for x, y in data(STEPS):
        step(model, optimizer, [(x * float("inf"), y)])
    with pytest.raises(ScoreError, match="no step of the ACCUMULATE stage"):
        step(model, optimizer, data(1))


def test_evaluation_between_steps_scores_nothing(make, data):
    model, batches = make(), data(STEPS)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for batch in batches:
        step(model, optimizer, [batch])
        model.eval()
        with torch.no_grad():
            model(batch[0])
        x = batch[0].clone().requires_grad_()
        loss_of(model, (x, batch[1])).backward()
        model.train()
        optimizer.zero_grad()
    assert_evidence(model, squares(batches))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batches_are_scored_before_training(make, data, mode):
    model, batches = make(score_steps=0), data(4)
    getattr(model, mode)()
    model.dps_score(batches, loss=loss_of)
    expected = squares(batches)
    assert_selected(model, expected)
    assert model.dps_status().steps == 0
    assert all(parameter.grad is None for parameter in trainable(model))
    model.train()
    before = [parameter.clone() for parameter in trainable(model)]
    step(model, AdamW(trainable(model), lr=1e-2), data(1, seed=2))
    assert_selected(model, expected)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


def test_a_copy_at_rest_is_left_alone(make, data):
    """As TRL's reference: it computes as it did, gathers nothing that counts, and selects nothing."""
    model, batches = make(), data(STEPS)
    optimizer = AdamW(trainable(model), lr=1e-2)
    reference = copy.deepcopy(model)
    dps_adapter(reference)._controller.at_rest = True
    expected = [reference(x) for x, _ in batches]
    for batch, output in zip(batches, expected, strict=True):
        with torch.no_grad():
            assert torch.equal(reference(batch[0]), output)
        step(model, optimizer, [batch])
    step(model, optimizer, data(1))
    assert model.dps_status().engaged
    assert not reference.dps_status().engaged
    assert reference.dps_status().steps == 0


@needs.one_graph
# What torch's compiler does at a graph break, and with autograd functions, is what other parts of torch warn of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("granularity", "backend"), [("column", "aot_eager"), ("row", "eager"), ("entry", "eager"), ("tensor", "eager")]
)
def test_compiled_models_train_alike(make, data, granularity, backend):
    compiled, plain = make(granularity=granularity), make(granularity=granularity)
    optimizers = [AdamW(trainable(model), lr=1e-2) for model in (compiled, plain)]
    torch._dynamo.reset()
    call = torch.compile(compiled, backend=backend)
    for number, batch in enumerate(data(STEPS + 3)):
        if number == STEPS + 1:  # once units are selected there is one graph
            torch._dynamo.reset()
            call = torch.compile(compiled, backend=backend, fullgraph=True)
        for model, optimizer in zip((call, plain), optimizers, strict=True):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert compiled.dps_status() == plain.dps_status()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@needs.one_graph
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("granularity", ["column", "row", "entry", "tensor"])
def test_a_loaded_adapter_is_one_graph(make, data, granularity, tmp_path):
    model = make(granularity=granularity)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for batch in data(STEPS + 2):
        step(model, optimizer, [batch])
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Checkpointed(SIZES).double(), tmp_path).eval()
    torch._dynamo.reset()
    x = data(1)[0][0]
    torch.testing.assert_close(
        torch.compile(loaded, backend="eager", fullgraph=True)(x), model.eval()(x), rtol=0, atol=1e-12
    )


def test_replicas_are_refused(make, data):
    model = make()
    replica = copy.copy(layers_of(model)[0])
    with pytest.raises(EngineError, match="DataParallel"):
        replica(data(1)[0][0])


def test_gradients_that_never_reach_an_optimizer_are_reported(make, data, caplog):
    """As with an engine that copies gradients to parameters of its own."""
    model, (batch,) = make(), data(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(34):
            loss_of(model, batch).backward()
            model.zero_grad()
    assert caplog.text.count("without an optimizer step that DPS could see") == len(LAYERS)
    assert not model.dps_status().engaged


def test_an_adapter_that_is_saved_before_its_selection_is_reported(make, data, caplog, tmp_path):
    model = make()
    optimizer = AdamW(trainable(model), lr=1e-2)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
        assert not caplog.records
        step(model, optimizer, data(1))
        model.save_pretrained(tmp_path)
        assert "saved without units" in caplog.text
        assert "None have been selected by step 1." in caplog.text
        assert "`score_steps`" in caplog.text
        caplog.clear()
        for batch in data(2 * STEPS):
            step(model, optimizer, [batch])
        model.save_pretrained(tmp_path)
        assert not caplog.records


class Pairs(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(12, generator=generator).double(), "labels": torch.tensor(index % 3)}


class Classifier(Checkpointed):
    def forward(self, x, labels=None):
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def make_trainer(tmp_path):
    def make_trainer(fields=None, callbacks=None, **arguments):
        torch.manual_seed(0)
        config = DPSConfig(
            **{
                "target_modules": list(LAYERS),
                "storage": "compact",
                "schedule": "once",
                "score_steps": STEPS,
                "granularity": "column",
                "train_bias": False,
                "density": 0.25,
                **(fields or {}),
            }
        )
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path),
                "per_device_train_batch_size": 4,
                "num_train_epochs": 1,
                "learning_rate": 1e-2,
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
                **arguments,
            }
        )
        model = get_peft_model(Classifier(SIZES).double(), config)
        return Trainer(model=model, args=args, train_dataset=Pairs(), callbacks=callbacks)

    return make_trainer


def test_the_trainer_scores_passes_and_selects(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=2, num_train_epochs=2, max_grad_norm=1e-3)
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append((inputs["x"].clone(), inputs["labels"].clone()))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    status = trainer.model.dps_status()
    assert (status.steps, status.engaged, status.unscored_steps) == (6, True, 0)
    assert_selected(trainer.model, squares(seen[: 2 * STEPS], 0.5))


def test_a_trainer_that_ends_before_the_selection_is_an_error(make_trainer):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    with pytest.raises(ScoreError, match=r"ended after 2 steps, before units were selected.*`score_steps`"):
        make_trainer(callbacks=[Stops()]).train()


@pytest.mark.parametrize("fields", [{}, {"total_steps": 100}])
def test_a_trainer_that_is_too_short_is_refused_at_its_beginning(make_trainer, fields):
    with pytest.raises(ConfigError, match="smaller `score_steps`"):
        make_trainer(fields, max_steps=STEPS).train()


def test_a_trainer_after_scoring(make_trainer):
    trainer = make_trainer({"score_steps": 0})
    data = [Pairs()[index] for index in range(8)]
    batches = [{"x": item["x"][None], "labels": item["labels"][None]} for item in data]
    trainer.model.dps_score(batches, loss=lambda model, batch: model(**batch)["loss"])
    index = [layer.dps_delta["default"].index.clone() for layer in layers_of(trainer.model)]
    trainer.train()
    for layer, expected in zip(layers_of(trainer.model), index, strict=True):
        assert torch.equal(layer.dps_delta["default"].index, expected)
        assert layer.dps_delta["default"].weight.count_nonzero()
