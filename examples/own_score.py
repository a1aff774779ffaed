"""A score of your own in ten lines: how much of a weight would change, in relation to its size.

It takes no data: copy the registered function into a training script of yours.
"""

import argparse

import torch
from peft import get_peft_model
from torch import nn

from peft_dps import DPSConfig, register_score

argparse.ArgumentParser(description=__doc__).parse_args()


@register_score("relative_gradient", evidence="absolute_gradient")
def relative_gradient(context):
    """Score by sum abs(G) / abs(W0): entries that are small and pulled at hard come first."""
    return context.evidence / context.base_weight.abs().clamp(min=1e-3)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))
config = DPSConfig(target_modules=["0", "2"], score="relative_gradient", stage_steps=10)
model = get_peft_model(model, config)

# A rate for a model without pretraining; a pretrained one takes 1e-4 or less.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
inputs = torch.randn(200, 20)
labels = (inputs[:, 0] > 0).long()
losses = []
for _ in range(40):
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))

print(model.dps_status())
print(f"the loss falls: {losses[-1] < 0.5 * losses[0]}")
