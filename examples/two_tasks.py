"""Two tasks by two sparse adapters of one model, added up (task arithmetic): half a minute on a CPU.

It takes no data: its point needs two tasks that one model can do, so it makes both up.
"""

import argparse

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_dps import recipes

argparse.ArgumentParser(description=__doc__).parse_args()
torch.manual_seed(1)
WORDS, LENGTH = 20, 6
# Whether most words of a sentence are of a kind; which kind is asked for, the first token says.
KINDS = {"A": lambda words: words >= WORDS // 2, "B": lambda words: words % 2 == 1}


def draw(task: str, count: int) -> dict[str, torch.Tensor]:
    """Sentences of a task, and their labels."""
    ids = torch.randint(WORDS, (count, LENGTH))
    ids[:, 0] = WORDS + list(KINDS).index(task)
    return {"input_ids": ids, "labels": (KINDS[task](ids[:, 1:]).sum(1) > LENGTH // 2 - 1).long()}


def train(model: nn.Module, tasks: str, steps: int, learning_rate: float) -> None:
    """Train on some tasks at once."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, learning_rate, weight_decay=0.0)
    model.train()
    for _step in range(steps):
        parts = [draw(task, 32 // len(tasks)) for task in tasks]
        model(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracies(model: nn.Module) -> list[float]:
    """How often the model is right, in each task."""
    model.eval()
    right = [model(input_ids=data["input_ids"]).logits.argmax(1) == data["labels"] for data in TESTS.values()]
    return [own.float().mean().item() for own in right]


TESTS = {task: draw(task, 512) for task in KINDS}

# A model that knows a little of both tasks. Put your own here: BertForSequenceClassification.from_pretrained(...).
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
base = BertForSequenceClassification(
    BertConfig(vocab_size=WORDS + len(KINDS), max_position_embeddings=LENGTH, **sizes, **others)
)
train(base, "AB", steps=100, learning_rate=1e-3)
table = {"pretrained": accuracies(base)}

# Each adapter holds 5% of the entries, chosen by the gradient of its first step.
model = get_peft_model(base, recipes.sift(), adapter_name="A")
model.add_adapter("B", recipes.sift())
for task in KINDS:
    model.set_adapter(task)
    train(model, task, steps=120, learning_rate=3e-3)
    print(model.dps_status())
    table[task] = accuracies(model)

model.base_model.add_weighted_adapter(["A", "B"], weights=[0.7, 0.7], adapter_name="sum")
model.set_adapter("sum")
table["A + B"] = accuracies(model)

print(f"{'':12}  task A  task B")
for name, (first, second) in table.items():
    print(f"{name:12}  {first:6.1%}  {second:6.1%}")
held = {
    name: sum(values.numel() for key, values in model.named_parameters() if f"dps_delta.{name}." in key)
    for name in ("A", "B", "sum")
}
print(f"entries: {held['A']} in A, {held['B']} in B, {held['sum']} in the sum, which holds those of both once")
weaker = {name: min(own) for name, own in table.items()}
print("in its weaker task the sum is ahead of each adapter:", weaker["A + B"] > max(weaker["A"], weaker["B"]))
