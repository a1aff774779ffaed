"""A tiny training with the HF Trainer, dropout and shuffling on; `python -m tests.trainer_resuming DIR` resumes some.

DIR holds an output folder for each training, with its plan and the checkpoint to resume from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from peft_dps import DPSConfig
from peft_dps.tuner.adapter import find_controllers
from tests.resuming import as_bits, held_by


class Sentences(Dataset):
    def __init__(self, count: int = 24) -> None:
        self.ids = torch.randint(50, (count, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].sum() % 2}


class Trace(TrainerCallback):
    """Takes down every weight, and all that DPS holds, after every step."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, tensor in everything(kwargs["model"]).items():
            self.tensors[f"{state.global_step}/{name}"] = tensor


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    held = {f"weights/{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for weight in find_controllers(model)["default"].weights:
        held.update({f"{kind}/{weight.name}": tensor for kind, tensor in held_by(weight).items()})
    return {name: as_bits(tensor).clone() for name, tensor in held.items()}


def make_base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes))


def make_trainer(output_dir: Path, fields: dict[str, Any], **arguments: Any) -> Trainer:
    """12 steps of 4 sentences each, unless told otherwise."""
    config = DPSConfig(**{"task_type": "SEQ_CLS", "density": 0.25, "stage_steps": 3, **fields})
    arguments = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trace = Trace()
    trainer = Trainer(
        model=get_peft_model(make_base(), config),
        args=TrainingArguments(str(output_dir), **arguments),
        train_dataset=Sentences(),
        eval_dataset=Sentences(4),
        callbacks=[trace],
    )
    trainer.trace = trace.tensors
    return trainer


if __name__ == "__main__":
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        plan = json.loads((folder / "plan.json").read_text())
        resumed = make_trainer(folder, plan["fields"], **plan["arguments"])
        resumed.train(resume_from_checkpoint=True)
        save_file(resumed.trace, folder / "trace.safetensors")
