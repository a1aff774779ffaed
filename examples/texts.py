"""What the examples train on: your model and your table, or else a tiny untrained BERT and random tokens."""

import argparse
import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

MAX_LENGTH = 128


@dataclass(frozen=True)
class Texts:
    """Examples to train on, all of one length, and the model to train."""

    model: str | None
    data: list[dict[str, Any]]
    classes: list[str] = field(default_factory=lambda: ["0", "1"])

    def base(self) -> PreTrainedModel:
        """Load the model, the same one every time."""
        torch.manual_seed(0)
        if self.model is not None:
            return AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=len(self.classes))
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=8, **sizes))


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that knows `--model` and `--data`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="path or Hub id of a pretrained model (default: a tiny BERT without training)")
    parser.add_argument("--data", type=Path, help="csv with the columns text and label (default: 80 random examples)")
    return parser


def load(options: argparse.Namespace) -> Texts:
    """Return what the flags say; your own model and data go together."""
    if (options.model is None) != (options.data is None):
        raise SystemExit("--model and --data go together: the tiny BERT has no tokenizer, and random tokens no text.")
    if options.data is None:
        ids = torch.randint(100, (80, 8), generator=torch.Generator().manual_seed(0))
        return Texts(None, [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in ids])
    with options.data.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"text", "label"} <= set(rows[0]):
        raise SystemExit(f"--data {str(options.data)!r} must have rows, and the columns text and label.")
    classes = sorted({row["label"] for row in rows})
    tokens = AutoTokenizer.from_pretrained(options.model)(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    data = [
        {**{name: values[number] for name, values in tokens.items()}, "labels": classes.index(row["label"])}
        for number, row in enumerate(rows)
    ]
    print(f"{len(data)} texts of {tokens['input_ids'].shape[1]} tokens, classes {', '.join(classes)}")
    return Texts(options.model, data, classes)
