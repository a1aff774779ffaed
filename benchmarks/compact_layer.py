"""`python -m benchmarks.compact_layer`: ways to compute a frozen linear layer with trained columns, beside each other.

Times are processor seconds of one thread for a forward and a backward pass. Each way takes its turn in each round, and
ratios to the frozen layer alone are taken within rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.archive import rounded
from benchmarks.engine import add_columns
from benchmarks.ratio import Spread
from benchmarks.tables import table

SHAPES = ((768, 768), (768, 3072), (3072, 768))  # inputs and outputs
FROZEN = "frozen alone"
RESULTS = Path(__file__).parent / "results" / "layer_cpu.json"
_HEAD = """\
### What is in the way

**Time.** y = x W^T and dL/dx are two thirds of a layer's work, whatever is trained. 5% of the columns of a square
layer of width 768 are 39: their products add 7.6% to these two, and those of a LoRA of rank 16 add 6.3%, with 0.8
times as many entries. So they cannot be a tenth faster than the LoRA. `columns-units`, with half its entries, is.

**Memory.** LoRA-FA trains 3 million entries less than 5% of the columns, and each takes 16 bytes with its gradient and
AdamW. W0 is part of the peak of SHiRA's process and of ours.

**Decoder.** W0 takes 1,475 of the LoRA's 2,260 MiB; attention, norms and the head keep another 466 whatever is
trained. The aims of 0.85 of its peak and 0.66 of what it keeps are below these. 5% of the columns are twice its
entries; `columns-units` has 0.55 of them, 0.95 of its step and 0.91 of its memory. While it scores, torch's peak is
0.96 of the LoRA's and the process's 1.17: the C library keeps the memory of each layer's gradient. In 18 GiB
`scoring` and `blocks` could be timed beside `full` alone, SHiRA and `entries` not at all.

**Other ways to compute a layer** (`python -m benchmarks.compact_layer`): a thread's processor seconds for forward and
backward passes of {rows} tokens, over those of the frozen layer; medians of {rounds} rounds with quartiles. Columns in
the weight itself, as in PaCA, would save about 0.1, and cost a base that can be quantized, shared or restored to the
bit. Padding columns to a multiple of eight, or turning products around, saves less than the noise.

"""
_MULTIPLE = 8  # columns that padding fills up to
Pass = Callable[[], torch.Tensor]


class _InPlace(torch.autograd.Function):
    """The trained columns stand in the weight itself, as in PaCA."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, delta: Any, index: Any) -> torch.Tensor:
        ctx.save_for_backward(x.index_select(1, index), weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        taken, weight = ctx.saved_tensors
        return gradient @ weight, None, None, gradient.t() @ taken, None


class _Fused(torch.autograd.Function):
    """One function for the layer and its columns; products padded, or the other way around."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, delta: Any, index: Any, way: str
    ) -> torch.Tensor:
        taken = x.index_select(1, index)
        ctx.save_for_backward(taken, weight, delta, index)
        ctx.way = way
        return F.linear(x, weight, bias).addmm_(taken, delta.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        taken, weight, delta, index = ctx.saved_tensors
        columns = index.numel()
        if ctx.way == "turned":
            part, own = (delta.t() @ gradient.t()).t(), (taken.t() @ gradient).t()
        else:
            more = (0, -columns % _MULTIPLE if ctx.way == "padded" else 0)
            part = (gradient @ F.pad(delta, more))[:, :columns]
            own = (gradient.t() @ F.pad(taken, more))[:, :columns]
        whole = gradient @ weight
        whole.scatter_add_(1, index.long().expand(part.shape), part)
        return whole, None, None, own.contiguous(), None, None


def ways(
    inputs: int, outputs: int, rows: int, density: float, rank: int
) -> tuple[dict[str, Pass], list[torch.Tensor]]:
    """Return ways to compute a forward pass, and what gets gradients."""
    torch.manual_seed(0)
    columns = math.ceil(density * inputs)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    index = torch.randperm(inputs)[:columns].sort().values.int()
    delta, a, b = torch.zeros(outputs, columns), torch.randn(rank, inputs), torch.zeros(outputs, rank)
    trained = [each.requires_grad_() for each in (x, delta, a, b)]
    fixed, written = a.detach(), weight.clone()

    def frozen(value: torch.Tensor = x) -> torch.Tensor:
        return F.linear(value, weight, bias)

    def in_place() -> torch.Tensor:
        written.index_copy_(1, index.long(), delta.detach())  # what the optimizer has changed
        return _InPlace.apply(x, written, bias, delta, index)

    def fused(way: str) -> Pass:
        return lambda: _Fused.apply(x, weight, bias, delta, index, way)

    found: dict[str, Pass] = {
        FROZEN: frozen,
        "peft_dps": lambda: add_columns(frozen, x, delta, index),
        "plain operators": lambda: frozen() + F.linear(x.index_select(1, index), delta),
        "columns in the weight": in_place,
        "one function": fused("plain"),
        "one function, padded": fused("padded"),
        "one function, turned": fused("turned"),
        "LoRA": lambda: frozen() + F.linear(F.linear(x, a), b) * 0.5,
        "LoRA-FA": lambda: frozen() + F.linear(F.linear(x, fixed), b) * 0.5,
    }
    return found, trained


def measure(shape: tuple[int, int], rows: int, density: float, rank: int, rounds: int) -> dict[str, Spread]:
    """Return per way the ratios of its times to those of the frozen layer alone."""
    found, trained = ways(*shape, rows=rows, density=density, rank=rank)
    gradient = torch.randn(rows, shape[1])
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name in found if number % 2 else reversed(found):
            for tensor in trained:
                tensor.grad = None
            start = time.thread_time()
            found[name]().backward(gradient)
            if number:  # the first warms up
                seconds[name].append(time.thread_time() - start)
    base = seconds[FROZEN]
    return {name: Spread.of([a / b for a, b in zip(own, base, strict=True)]) for name, own in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each shape, and print a table.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compact_layer", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="tokens in a batch")
    parser.add_argument("--density", type=float, default=0.05, help="fraction of columns")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA")
    parser.add_argument("--rounds", type=int, default=21, help="rounds that count")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of others no processor time is known
    try:
        found = [measure(each, options.rows, options.density, options.rank, options.rounds) for each in SHAPES]
    finally:
        torch.set_num_threads(threads)
    document = {
        **{name: getattr(options, name) for name in ("rows", "density", "rank", "rounds")},
        "shapes": SHAPES,
        "ratios": {
            name: [[each[name].median, each[name].lower, each[name].upper] for each in found] for name in found[0]
        },
    }
    document = rounded(document)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(section(document))


def section(document: dict[str, Any]) -> str:
    """Make the table of the page.

    Args:
        document: Content of the results file.
    """
    rows = [("way", *(f"{inputs} to {outputs}" for inputs, outputs in document["shapes"]))]
    for name, ratios in document["ratios"].items():
        rows.append((name, *(f"{median:.3f} ({lower:.3f} to {upper:.3f})" for median, lower, upper in ratios)))
    return _HEAD.format(**document) + table(rows, words=1)


if __name__ == "__main__":
    main()
