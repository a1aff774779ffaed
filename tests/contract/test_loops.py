"""The same training, bit for bit, whichever loop drives it: what the engine does around the step must not matter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from peft_dps import DPSConfig, dps_adapter
from peft_dps.errors import ScheduleError
from tests.device import DEVICE, ON_CPU

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates on import
    import pytorch_lightning as lightning

VARIANTS = ("dense", "mix")
STEPS = 10
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers:UserWarning",
        "ignore:.*isinstance.treespec, LeafSpec.:FutureWarning",
        "ignore:.*`isinstance.treespec, LeafSpec.*",
    ),
]


def make_model(variant="dense", **fields):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(DEVICE)
    config = DPSConfig(target_modules=["0", "2"], variant=variant, density=0.5, **{"stage_steps": 2, **fields})
    return get_peft_model(net, config)


def make_data(batches=STEPS):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8 * batches, 12, generator=generator), torch.randint(3, (8 * batches,), generator=generator)


def make_optimizer(model):
    """Two groups of parameters with decay on one of them, as most recipes have it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim == 1]
    return AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def plain(model, *, micro_batch=8, accumulate=1, clip=None):
    """The oracle: a loop with nothing of an engine in it."""
    optimizer = make_optimizer(model)
    scheduler = OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
    x, y = (tensor.to(DEVICE) for tensor in make_data())
    for index, (part_x, part_y) in enumerate(zip(x.split(micro_batch), y.split(micro_batch), strict=True), start=1):
        (loss_of(model, part_x, part_y) / accumulate).backward()
        if index % accumulate == 0:
            if clip is not None:
                clip([parameter for group in optimizer.param_groups for parameter in group["params"]])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


class Automatic(lightning.LightningModule):
    """Lightning makes the steps; it passes them a closure."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return loss_of(self.model, *batch)

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model)
        scheduler = OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Automatic):
    """The user makes the steps, through Lightning's wrapper of the optimizer."""

    def __init__(self, model):
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, *batch))
        optimizer.step()
        self.lr_schedulers().step()


def fit(module, *, micro_batch=8, **arguments):
    loader = DataLoader(TensorDataset(*make_data()), batch_size=micro_batch)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator=DEVICE.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, loader)
    return module.model


def assert_same_training(model, oracle):
    status = dps_adapter(model).status()
    assert (status.steps, status.engaged, status.frozen_moved) == (STEPS, True, False)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu()), name  # Lightning leaves a model on the CPU


@pytest.mark.supports("Training", "Lightning, automatic and manual: as a plain loop, to the bit")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("module", [Automatic, Manual])
def test_lightning(variant, module):
    assert_same_training(fit(module(make_model(variant))), plain(make_model(variant)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_with_gradient_accumulation(variant):
    ours = fit(Automatic(make_model(variant)), micro_batch=4, accumulate_grad_batches=2)
    assert_same_training(ours, plain(make_model(variant), micro_batch=4, accumulate=2))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightning_with_clipping(algorithm):
    ours = fit(Automatic(make_model()), gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)

    def clip(parameters):
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, 0.05)
        else:
            nn.utils.clip_grad_value_(parameters, 0.05)

    assert_same_training(ours, plain(make_model(), clip=clip))


def test_lightning_with_several_optimizers():
    class TwoOptimizers(Manual):
        def configure_optimizers(self):
            layers = self.model.base_model.model
            return [SGD([p for p in layers[index].parameters() if p.requires_grad], lr=0.1) for index in (0, 2)]

        def training_step(self, batch, _):
            self.manual_backward(loss_of(self.model, *batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    oracle = make_model()
    optimizer = SGD([parameter for parameter in oracle.parameters() if parameter.requires_grad], lr=0.1)
    for x, y in zip(*(tensor.to(DEVICE).split(8) for tensor in make_data()), strict=True):
        optimizer.zero_grad()
        loss_of(oracle, x, y).backward()
        optimizer.step()
    assert_same_training(fit(TwoOptimizers(make_model())), oracle)


def test_a_fraction_of_the_steps_needs_the_total_in_lightning():
    with pytest.raises(ScheduleError, match="total_steps"):
        fit(Automatic(make_model(stage_steps=0.2)))
    model = make_model(stage_steps=0.2, total_steps=50)
    fit(Automatic(model))
    assert (model.dps_status().steps, model.dps_status().stage_steps) == (STEPS, 10)


@pytest.mark.supports("Training", "Seq2SeqTrainer: as a plain loop, to the bit")
@pytest.mark.parametrize("variant", VARIANTS)
def test_seq2seq_trainer(variant, tmp_path):
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(config).to(DEVICE)
    fields = {"task_type": "SEQ_2_SEQ_LM", "variant": variant, "density": 0.5}
    ids = torch.randint(1, 30, (4 * STEPS, 6), generator=torch.Generator().manual_seed(1)).tolist()
    model = get_peft_model(copy.deepcopy(base), DPSConfig(stage_steps=2, **fields))
    seen = []
    model.base_model.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(
            {name: value.clone() for name, value in inputs.items() if value is not None}
        ),
        with_kwargs=True,
    )
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        use_cpu=ON_CPU,
        disable_tqdm=True,
        predict_with_generate=True,
    )
    Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row[::-1]} for row in ids],
        data_collator=collate,
    ).train()

    oracle = get_peft_model(copy.deepcopy(base), DPSConfig(stage_steps=2, **fields)).train()
    trainable = [parameter for parameter in oracle.parameters() if parameter.requires_grad]
    optimizer = AdamW(trainable, lr=1e-2, weight_decay=0.0, fused=True)
    for batch in seen:
        optimizer.zero_grad()
        oracle.base_model.model(**{name: batch[name] for name in ("input_ids", "labels")}).loss.backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
    assert_same_training(model, oracle)


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
