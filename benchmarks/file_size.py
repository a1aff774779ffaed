"""`python -m benchmarks.file_size`: how large the exported file of an adapter is, after a real fine-tuning."""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import zstandard
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from benchmarks.engine import byte_planes, encode, trained_tensors
from benchmarks.machine import describe_machine, list_versions
from peft_dps import DPSConfig, disable_dropout, export_adapter
from peft_dps.compare.data.assets import Assets, fetch_assets
from peft_dps.compare.data.sentiment import sentiment_task
from peft_dps.compare.data.task import tokenize
from peft_dps.compare.runs.pretrained import quieten
from peft_dps.compare.settings import Settings

LAYERS_OF_THE_BASE = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
CODERS: dict[str, Callable[[bytes], bytes]] = {
    "zlib 1": lambda data: zlib.compress(data, 1),
    "zlib 6": lambda data: zlib.compress(data, 6),
    "bz2": bz2.compress,
    "lzma 1": lambda data: lzma.compress(data, preset=1),
    **{
        f"zstandard {level}": zstandard.ZstdCompressor(level=level, write_checksum=True).compress
        for level in (1, 3, 9, 19)
    },
}
LOSSES = "losses.json"
SAMPLE = 6  # weights on which coders are compared


@dataclass(frozen=True)
class Case:
    """An adapter to train: a variant, the dtype of the base model, and whether copies are kept in fp32."""

    variant: str
    base: str
    fp32_copies: bool

    @property
    def name(self) -> str:
        """What the results call it."""
        return f"{self.variant}-base-{self.base}-copies-{'float32' if self.fp32_copies else self.base}"


CASES = (
    Case("dense", "float32", True),
    Case("mix", "float32", True),
    Case("dense", "bfloat16", False),
    Case("mix", "bfloat16", False),
    Case("dense", "bfloat16", True),
)


def main() -> None:
    """Train each case, export it, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each training")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="peak learning rate of AdamW")
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("runs/adapters"),
        help="trained adapters; not trained again",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/file_size.json"), help="JSON file to write")
    options = parser.parse_args()
    quieten()
    assets = fetch_assets()
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": {**list_versions(), "zstandard": zstandard.__version__},
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "cases": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        folder = options.adapters / case.name
        if not folder.exists():
            train(case, assets, options.steps, options.learning_rate, folder)
        losses = json.loads((folder / LOSSES).read_text(encoding="utf-8"))
        model = PeftModel.from_pretrained(
            load_base(case, assets), folder, is_trainable=True, autocast_adapter_dtype=case.fp32_copies
        )
        measured = {"case": case.name, **asdict(case), "losses": losses, **measure(model, case, assets)}
        document["cases"].append(measured)
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(measured, indent=1), flush=True)


def load_base(case: Case, assets: Assets) -> torch.nn.Module:
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        assets.model, num_labels=2, dtype=getattr(torch, case.base)
    )


def train(case: Case, assets: Assets, steps: int, learning_rate: float, folder: Path) -> None:
    """Train on sentences of movie reviews; save the adapter with its mean loss over the first and last 20 steps."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    task = sentiment_task(assets.corpora, Settings(validation_size=100)).draw(3200, 0)
    data = tokenize(task.train, tokenizer, 64)
    base = load_base(case, assets)
    disable_dropout(base)
    config = DPSConfig(variant=case.variant, task_type="SEQ_CLS", total_steps=steps, train_remaining=True)
    model = get_peft_model(base, config, autocast_adapter_dtype=case.fp32_copies)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (1 - step / steps)
    )
    losses = []
    model.train()
    for batch in islice(batches(data, tokenizer), steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    means = [sum(part) / len(part) for part in (losses[:20], losses[-20:])]
    (folder / LOSSES).write_text(json.dumps(means), encoding="utf-8")


def batches(data: Any, tokenizer: Any) -> Iterator[Any]:
    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    while True:
        yield from loader


def measure(model: PeftModel, case: Case, assets: Assets) -> dict[str, Any]:
    """Measure the file, its parts, and coders on some of its weights."""
    tensors = list(trained_tensors(model, "default"))
    targets = [(tensor.value, tensor.pretrained) for tensor in tensors if tensor.in_layer]
    rest = [
        (tensor.value, tensor.pretrained)
        for tensor in tensors
        if not tensor.in_layer and "classifier" not in tensor.key  # a new head is stored whole
    ]
    return {
        "relative_change": float(
            torch.cat([(a.detach().float() - b.float()).flatten() for a, b in targets]).norm()
            / torch.cat([b.float().flatten() for _, b in targets]).norm()
        ),
        "parts": {name: part(pairs) for name, pairs in (("targets", targets), ("rest", rest))},
        "file": export(model, case, assets),
        "coders": compare_coders([pair for pair in targets if pair[0].dim() == 2][-SAMPLE:]),
    }


def part(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    whole = sum(trained.numel() * trained.element_size() for trained, _ in pairs)
    exported = sum(encode(trained, pretrained).numel() for trained, pretrained in pairs)
    return {"whole_bytes": whole, "file_bytes": exported, "ratio": exported / whole}


def export(model: PeftModel, case: Case, assets: Assets) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = export_adapter(model, folder, saved_modules=LAYERS_OF_THE_BASE)
        exported = time.perf_counter()
        base = load_base(case, assets)
        loading = time.perf_counter()
        PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=case.fp32_copies)
        seconds = {"export_seconds": exported - start, "load_seconds": time.perf_counter() - loading}
    return {**asdict(report), "ratio": report.ratio, **seconds}


def compare_coders(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, dict[str, float]]:
    planes = [plane for trained, base in pairs for plane in byte_planes(trained, base.to(trained.dtype))]
    size = sum(map(len, planes))
    compared = {}
    for name, compress in CODERS.items():
        start = time.perf_counter()
        compressed = sum(len(compress(plane)) for plane in planes)
        seconds = time.perf_counter() - start
        compared[name] = {"ratio": compressed / size, "megabytes_per_second": size / seconds / 1e6}
    return compared


if __name__ == "__main__":
    main()
