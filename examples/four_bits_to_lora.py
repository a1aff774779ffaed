"""A compact adapter on a 4-bit model, with the Trainer and a resume, that leaves as a LoRA: seconds on a CPU.

It takes no data: README.md trains a decoder in 4 bits on a table; this shows that a resume is exact, and the LoRA too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import bitsandbytes
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ids = torch.randint(2, 60, (64, 8), generator=torch.Generator().manual_seed(0))
ids[:, 1::2] = ids[:, ::2]  # something to learn: every token comes twice
data = [{"input_ids": row, "labels": row} for row in ids]


def load_base() -> LlamaForCausalLM:
    """Put your own here: AutoModelForCausalLM.from_pretrained(..., quantization_config=BitsAndBytesConfig(...))."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=8, **sizes))
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            in_4_bits = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            in_4_bits.load_state_dict(module.state_dict())
            model.model.set_submodule(name, in_4_bits.to("cpu"))
    return model


def make_trainer(folder: str) -> Trainer:
    """What a training script does from its start, in every run of it."""
    from peft_dps import DPSConfig

    model = get_peft_model(load_base(), DPSConfig.compact(units=4, score_steps=3, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=1e-2,
        logging_steps=4,
        save_steps=2,
        disable_tqdm=True,
        report_to="none",
    )
    return Trainer(model=model, args=arguments, train_dataset=data)


def answer(model: nn.Module) -> torch.Tensor:
    """The logits of a few samples."""
    with torch.no_grad():
        return model.eval()(ids[:4].to(model.device)).logits.cpu()


def serve(lora: str) -> None:
    """Load the LoRA with PEFT alone, as whoever serves it does."""
    base = load_base()
    base.is_loaded_in_4bit = True  # transformers says so of a model that it has quantized
    served = PeftModel.from_pretrained(base, lora)
    difference = (answer(served) - torch.load(Path(lora, "answer.pt"), weights_only=True)).abs().max()
    alone = "peft_dps" not in sys.modules
    print(f"served without peft_dps: {alone}, largest difference below 1e-5: {bool(difference < 1e-5)}")


def train(folder: str) -> None:
    """Train to the end, begin again from a checkpoint, and export."""
    from peft_dps import export_adapter

    whole = make_trainer(folder)
    whole.train()
    print(whole.model.dps_status())
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    print("the loss falls:", losses[-1] < losses[0])

    for step in (2, 6):  # in the middle of scoring, and after the selection
        resumed = make_trainer(folder)
        resumed.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{step}")))
        pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
        print(f"resumed after step {step}, bit for bit:", all(torch.equal(a, b) for a, b in pairs))

    print(export_adapter(whole.model, Path(folder, "lora"), form="lora"))
    torch.save(answer(whole.model), Path(folder, "lora", "answer.pt"))
    subprocess.run([sys.executable, __file__, "--serve", str(Path(folder, "lora"))], check=True, env=os.environ)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", metavar="LORA", help="only load an exported LoRA; the program calls itself so")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    else:
        with tempfile.TemporaryDirectory() as folder:
            train(folder)
