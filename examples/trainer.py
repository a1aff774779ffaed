"""DPS with the HF Trainer, on a tiny untrained BERT: no network, seconds on a CPU."""

import tempfile

import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

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

disable_dropout(base)  # as the paper's runs did

# A fraction of all steps: the Trainer knows their number, and `import peft_dps` gave every Trainer the callback that
# passes it on. 40 steps make stages of 10. The default, 0.05, suits trainings of 200 steps or more.
model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=0.25))

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=1e-4,
        logging_steps=10,  # once a stage
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()

# The logs say what DPS did; "selected" is the fraction at the latest selection.
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"step {log['step']}: cycle {log['dps_cycle']}, {log['dps_stage']}, selected {log['dps_selected']}")
print(model.dps_status())
