"""DPS on weights that FSDP2 has cut over processes: seconds on two CPU processes or two GPUs.

torchrun --nproc-per-node 2 examples/fsdp2.py

It takes no data: which modules are sharded is a matter of the model, so put yours into `load_base` and the loop below.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification

from peft_dps import DPSConfig, disable_dropout, dps_adapter

argparse.ArgumentParser(description=__doc__).parse_args()


def load_base() -> BertForSequenceClassification:
    """Put your own here: BertForSequenceClassification.from_pretrained(...)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=8, **sizes))


STEPS, BATCH = 40, 8
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()

# First the adapter, then the shards: each block by itself, then what is left.
base = load_base()
disable_dropout(base)  # as the paper's runs did
model = get_peft_model(base, DPSConfig(task_type="SEQ_CLS", stage_steps=10)).to(device)
mesh = dist.device_mesh.init_device_mesh(device.type, (size,))
for block in model.base_model.model.bert.encoder.layer:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
# The optimizer is made last, since sharding replaces the parameters.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

model.train()
generator = torch.Generator().manual_seed(rank)  # each process has batches of its own
for _ in range(STEPS):
    ids = torch.randint(100, (BATCH, 8), generator=generator).to(device)
    model(input_ids=ids, labels=(ids[:, 0] >= 50).long()).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    print(model.dps_status(), flush=True)  # selected entries of whole weights; whether the rows of this process moved
dps_adapter(model).check_ranks_agree()

# Every process takes part in collecting the weights; the first one writes them.
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=options)
with tempfile.TemporaryDirectory() as folder:
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        loaded = PeftModel.from_pretrained(load_base(), folder)
        print("loaded", loaded.peft_config["default"].peft_type.value, flush=True)
dist.barrier()
# Taking the process group down may hang in torch with gloo; the process ends here anyway.
os._exit(0)
