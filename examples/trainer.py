"""Compact columns or DPS Dense with the HF Trainer, on your model and table or, in seconds, on a tiny untrained BERT.

python examples/trainer.py --model sentence-transformers/all-MiniLM-L6-v2 --data reviews.csv --output my-adapter
"""

import tempfile

import torch
from peft import get_peft_model
from texts import load, make_parser
from transformers import Trainer, TrainingArguments

from peft_dps import DPSConfig, disable_dropout

parser = make_parser(__doc__)
parser.add_argument(
    "--columns", type=int, help="train so many columns of each layer (default: DPS Dense, all entries)"
)
parser.add_argument("--epochs", type=float, default=4)
parser.add_argument("--learning-rate", type=float, help="default: 3e-3 for columns, 1e-4 for DPS Dense")
options = parser.parse_args()
texts = load(options)
base = texts.base()

if options.columns is not None:
    config = DPSConfig.compact(units=options.columns, task_type="SEQ_CLS")
else:
    disable_dropout(base)  # as the paper's runs did
    # A fraction of all steps: the Trainer knows their number, and `import peft_dps` gave every Trainer the callback
    # that passes it on. The default, 0.05, suits trainings of 200 steps or more.
    config = DPSConfig(task_type="SEQ_CLS", stage_steps=0.25)
model = get_peft_model(base, config)

rate = 1e-4 if options.columns is None else 3e-3
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        num_train_epochs=options.epochs,
        learning_rate=rate if options.learning_rate is None else options.learning_rate,
        logging_steps=0.25,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=texts.data)
    trainer.train()

# The logs say what DPS did; "selected" is the fraction at the latest selection.
for log in trainer.state.log_history:
    if "loss" in log:
        said = f"cycle {log['dps_cycle']}, {log['dps_stage']}, selected {log['dps_selected']}, loss {log['loss']:.3f}"
        print(f"step {log['step']}: {said}")
print(model.dps_status())
if options.output:
    model.save_pretrained(options.output)
    print(f"The adapter is in {options.output}.")
