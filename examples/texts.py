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
    pad_token_id: int | None = None

    def base(self) -> PreTrainedModel:
        """Load the model, the same one every time."""
        torch.manual_seed(0)
        if self.model is not None:
            names = dict(enumerate(self.classes))
            numbers = {name: number for number, name in names.items()}
            return AutoModelForSequenceClassification.from_pretrained(
                self.model, id2label=names, label2id=numbers, pad_token_id=self.pad_token_id
            )
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=8, **sizes))


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that knows `--model`, `--data` and `--output`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="path or Hub id of a pretrained model (default: a tiny BERT without training)")
    parser.add_argument("--data", type=Path, help="csv with the columns text and label (default: 80 random examples)")
    parser.add_argument("--output", type=Path, help="folder for the adapter (default: it is not kept)")
    return parser


def load(options: argparse.Namespace) -> Texts:
    """Return what the flags say; your own model and data go together."""
    if (options.model is None) != (options.data is None):
        raise SystemExit("--model and --data go together: the tiny BERT has no tokenizer, and random tokens no text.")
    if options.data is None:
        ids = torch.randint(100, (80, 8), generator=torch.Generator().manual_seed(0))
        return Texts(None, [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in ids])
    rows = _read(options.data)
    labels = {row["label"] for row in rows}
    classes = sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)
    if len(classes) < 2:
        raise SystemExit(f"--data {str(options.data)!r} must have two classes or more, got {', '.join(classes)}.")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:  # as in GPT-2 and other decoders
        tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    data = [
        {**{name: values[number] for name, values in tokens.items()}, "labels": classes.index(row["label"])}
        for number, row in enumerate(rows)
    ]
    print(f"{len(data)} texts of {tokens['input_ids'].shape[1]} tokens, classes {', '.join(classes)}")
    return Texts(options.model, data, classes, tokenizer.pad_token_id)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel puts a mark before the first column
        rows = list(csv.DictReader(file))
    found = [str(name) for name in rows[0]] if rows else []
    if not {"text", "label"} <= set(found):
        raise SystemExit(
            f"--data {str(path)!r} must have rows, and the columns text and label, got {', '.join(found) or 'none'}."
        )
    gaps = [str(number) for number, row in enumerate(rows, 1) if not row["text"] or not row["label"]]
    if gaps:
        raise SystemExit(
            f"--data {str(path)!r} must have a text and a label in each row, not in {', '.join(gaps[:3])}."
        )
    return rows
