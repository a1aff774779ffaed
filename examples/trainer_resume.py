"""A Trainer with DPS Mix that is interrupted and resumes exactly, on your model and table or a tiny untrained BERT."""

import tempfile

import torch
from peft import get_peft_model
from texts import load, make_parser
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dps import DPSConfig, disable_dropout

BATCH, EPOCHS = 8, 4
options = make_parser(__doc__).parse_args()
texts = load(options)
steps = EPOCHS * -(-len(texts.data) // BATCH)


def make_trainer(folder: str) -> Trainer:
    """What a training script does from its start, in every run of it."""
    base = texts.base()
    disable_dropout(base)  # Mix brings noise of its own
    model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=0.25, variant="mix"))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=1e-4,
        save_steps=max(1, steps // 8),
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    return Trainer(model=model, args=arguments, train_dataset=texts.data)


class Interruption(TrainerCallback):
    """Stands in for a machine that fails some steps after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        """Fail."""
        if state.global_step == int(0.45 * steps):
            raise KeyboardInterrupt


with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other_folder:
    interrupted = make_trainer(folder)
    interrupted.add_callback(Interruption())
    try:
        interrupted.train()
    except KeyboardInterrupt:
        print("interrupted at", interrupted.model.dps_status())

    # The checkpoint lies in the middle of SUBNETWORK: its masks are in there, beside the adapter.
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    print("resumed, ended at", resumed.model.dps_status())

    whole = make_trainer(other_folder)
    whole.train()

same = all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
print("as if never interrupted, bit for bit:", same)
if options.output:
    resumed.model.save_pretrained(options.output)
