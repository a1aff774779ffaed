"""DPS Dense with Accelerate and gradient accumulation, on your model and table or on a tiny untrained BERT.

accelerate launch examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from texts import load, make_parser
from torch.utils.data import DataLoader

from peft_dps import DPSConfig, disable_dropout

EPOCHS, MICRO_BATCHES = 16, 2
options = make_parser(__doc__).parse_args()
texts = load(options)
accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
base = texts.base()
disable_dropout(base)  # as the paper's runs did
model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=0.25))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(texts.data, batch_size=8, shuffle=True))
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
with tempfile.TemporaryDirectory() as temporary:
    folder = options.output or temporary
    dps_model.save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        loaded = PeftModel.from_pretrained(texts.base(), folder)
        print("loaded", loaded.peft_config["default"].peft_type.value)
