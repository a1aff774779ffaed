"""A Trainer that is interrupted and resumes exactly, on a tiny untrained BERT: no network, seconds on a CPU."""

import tempfile

import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from peft_dps import DPSConfig, disable_dropout

ids = torch.randint(100, (64, 8), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in ids]


def make_trainer(folder: str) -> Trainer:
    """What a training script does from its start, in every run of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Put your own here: BertForSequenceClassification.from_pretrained(...).
    base = BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=8, **sizes))
    disable_dropout(base)  # Mix brings noise of its own
    model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=0.25, variant="mix"))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        num_train_epochs=5,
        learning_rate=1e-4,
        save_steps=5,
        disable_tqdm=True,
        report_to="none",
    )
    return Trainer(model=model, args=arguments, train_dataset=data)


class Interruption(TrainerCallback):
    """Stands in for a machine that fails in step 18, three steps after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        """Fail."""
        if state.global_step == 18:
            raise KeyboardInterrupt


with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other_folder:
    interrupted = make_trainer(folder)
    interrupted.add_callback(Interruption())
    try:
        interrupted.train()
    except KeyboardInterrupt:
        print("interrupted at", interrupted.model.dps_status())

    # The checkpoint of step 15 lies in the middle of SUBNETWORK: its masks are in there, beside the adapter.
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    print("resumed, ended at", resumed.model.dps_status())

    whole = make_trainer(other_folder)
    whole.train()

same = all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
print("as if never interrupted, bit for bit:", same)
