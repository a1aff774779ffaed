"""DPS with Accelerate and gradient accumulation, on a tiny untrained BERT: no network, seconds on a CPU."""

import tempfile

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from peft_dps import DPSConfig, disable_dropout


def load_base() -> BertForSequenceClassification:
    """Put your own here: BertForSequenceClassification.from_pretrained(...)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=8, **sizes))


EPOCHS, MICRO_BATCHES = 8, 2
ids = torch.randint(100, (160, 8), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in ids]

accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
base = load_base()
disable_dropout(base)  # as the paper's runs did
model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=0.25))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))
dps_model = accelerator.unwrap_model(model)

# A fraction needs the number of optimizer steps of one process, not of forwards: ask the prepared loader.
# `DPSConfig(total_steps=...)` does the same.
dps_model.set_dps_total_steps(EPOCHS * -(-len(loader) // MICRO_BATCHES))

model.train()
for _epoch in range(EPOCHS):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()  # a step for DPS only when gradients are complete
            optimizer.zero_grad()
accelerator.print(dps_model.dps_status())

# The adapter loads like any other of PEFT's, onto the same base model.
with tempfile.TemporaryDirectory() as folder:
    dps_model.save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        loaded = PeftModel.from_pretrained(load_base(), folder)
        print("loaded", loaded.peft_config["default"].peft_type.value)
