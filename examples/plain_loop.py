"""DPS Dense in a plain torch loop, on your model and table or, in seconds, on a tiny untrained BERT."""

import torch
from peft import get_peft_model
from texts import load, make_parser
from torch.utils.data import DataLoader

from peft_dps import DPSConfig, disable_dropout

options = make_parser(__doc__).parse_args()
texts = load(options)
device = "cuda" if torch.cuda.is_available() else "cpu"
loader = DataLoader(texts.data, batch_size=8, shuffle=True)

# With little data, training without dropout did better (docs/findings.md).
base = texts.base()
disable_dropout(base)

# A loop of our own tells DPS nothing about its length, so the stage is given in steps: here each epoch is a stage.
# What is not said is as in the paper: a density of 0.7, for one.
model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=len(loader))).to(device)

# A learning rate for full fine-tuning, which this is; larger models take less (the paper's runs 2e-5).
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model.train()
for _epoch in range(4):
    losses = []
    for batch in loader:
        loss = model(**{name: values.to(device) for name, values in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # DPS listens here; nothing else has to be called
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"mean loss {sum(losses) / len(losses):.3f}, {model.dps_status()}")

# The proof: a subnetwork was selected, and what it left out kept its bits.
status = model.dps_status()
print(f"engaged: {status.engaged}, frozen entries moved: {status.frozen_moved}")

if options.output:
    model.save_pretrained(options.output)

# Merging leaves an ordinary model.
print(type(model.merge_and_unload()).__name__)
