"""DPS in a plain torch loop, on a tiny untrained BERT: no network, seconds on a CPU."""

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from peft_dps import DPSConfig, disable_dropout

torch.manual_seed(0)

# Put your own here: BertForSequenceClassification.from_pretrained(...).
base = BertForSequenceClassification(
    BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=8,
    )
)
ids = torch.randint(100, (80, 8))
data = [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in ids]

# With little data, training without dropout did better (docs/findings.md).
disable_dropout(base)

# A loop of our own tells DPS nothing about its length, so the stage is given in steps. Ten batches an epoch and stages
# of ten steps make each epoch a stage. What is not said is as in the paper: a density of 0.7, for one.
model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=10))

# A learning rate for full fine-tuning, which this is; larger models take less (the paper's runs 2e-5).
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model.train()
for _epoch in range(4):
    for batch in DataLoader(data, batch_size=8, shuffle=True):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # DPS listens here; nothing else has to be called
        optimizer.zero_grad()
    print(model.dps_status())

# The proof: a subnetwork was selected, and what it left out kept its bits.
status = model.dps_status()
print(f"engaged: {status.engaged}, frozen entries moved: {status.frozen_moved}")

# Merging leaves an ordinary model.
print(type(model.merge_and_unload()).__name__)
