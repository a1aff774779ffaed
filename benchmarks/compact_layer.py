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

Two thirds of a layer's work stay whatever is trained: y = x W^T and dL/dx. With 5% of the columns, a square layer of
width 768 trains 39 of them. Their three products take 7.6% of that work, and those of a LoRA of rank 16 take 6.3%,
for 0.8 times as many entries (0.6 over the whole model). So columns at 0.05 cannot be a tenth faster than this LoRA
by arithmetic; `columns-units`, with as many columns as the LoRA has ranks, trains half as many entries as it does.

The extra peak beside LoRA-FA is what 5% of the columns are more than half a LoRA of rank 16: 3 million entries, of 16
bytes each with gradient and AdamW. In the process's peak beside SHiRA's, W0 is in both.

The decoder has four times the weights and a quarter of the tokens, so that most of its memory is W0: 1,475 of a LoRA's
2,260 MiB. Another 466 MiB are kept by attention, norms and the head, whatever is trained. 0.85 of the LoRA's peak is
less than the two together, and 0.66 of what it keeps is less than 466 MiB. 5% of the columns are twice the LoRA's
entries there, which AdamW updates in each step; `columns-units` has 0.55 of them, and takes 0.95 of its step and 0.91
of its memory. In `scoring` torch allocates less than the LoRA's training does; the process holds more, since the C
library keeps what a layer's gradient took. In 18 GiB `scoring` and `blocks` fit beside `full` alone; SHiRA and
`entries` were left out.

Ways to compute the layer, `python -m benchmarks.compact_layer`: processor seconds of one thread for a forward and a
backward pass of {rows} tokens, over those of the frozen layer alone in the same round; medians of {rounds} rounds with
quartiles. Columns that stand in the weight itself, as in PaCA, spare two of three products. They would save about 0.1
of a layer's passes, and cost a base that is quantized, shared or restored to the bit. Columns padded to a multiple of
eight, or products turned around, save less than the noise.

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
    rows = [("way", "", *(f"{inputs} to {outputs}" for inputs, outputs in document["shapes"]))]
    for name, ratios in document["ratios"].items():
        rows.append((name, "", *(f"{median:.3f} ({lower:.3f} to {upper:.3f})" for median, lower, upper in ratios)))
    return _HEAD.format(**document) + table(rows)


if __name__ == "__main__":
    main()
