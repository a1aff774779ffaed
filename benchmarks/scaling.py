"""`python -m benchmarks.scaling`: DPS on DDP and FSDP2 beside plain training on them, on CPU processes with gloo.

All variants live in the same processes and take their steps in turn, so that what else the machine does reaches all
alike. Measured are the ratios of step times, the bytes that a step communicates, and how the cost of a selection grows
with the entries that a process holds. What gloo takes on one machine says little of NCCL between GPUs: the bytes carry
over, the times do not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert.modeling_bert import BertLayer

from benchmarks.engine import select, unsharded_parameters
from benchmarks.machine import describe_machine, list_versions, load
from benchmarks.ratio import Spread, seconds, step_ratios
from benchmarks.rounds import FIGURES, Round, Run, figure_of, stage_of, turned
from benchmarks.settings import SIZES, Settings
from benchmarks.traffic import traffic_of
from benchmarks.worker import Trainee, quieten

DENSITY = 0.3


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp2(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    ignored = unsharded_parameters(model)
    for module in list(model.modules()):
        if isinstance(module, BertLayer):
            fully_shard(module, mesh=mesh, ignored_params=ignored)
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": _ddp, "fsdp2": _fsdp2}
PLAIN = "plain"
METHODS = {PLAIN: "full-linear", "dense": "dps-exact", "mix": "mix-exact"}
OFFLOADED = {"dense-offloaded": "dps-offloaded", "mix-offloaded": "mix-offloaded"}  # which FSDP2 does not collect


def variants_on(engine: str) -> dict[str, str]:
    """Return what is measured on an engine: names, and the variants of `benchmarks.variant` that they are."""
    methods = METHODS | OFFLOADED if engine == "fsdp2" else METHODS
    return {f"{engine}-{method}": variant for method, variant in methods.items()}


def comparisons(engines: Iterable[str]) -> list[tuple[str, str]]:
    """Return which name is held against which: each against plain training on the same engine."""
    pairs = [(name, f"{engine}-{PLAIN}") for engine in engines for name in variants_on(engine)]
    return [(name, against) for name, against in pairs if name != against]


@dataclass(frozen=True)
class Measured:
    """What the processes have measured.

    Attributes:
        run: Step times of the first process.
        traffic: Per variant and figure, the bytes that one process communicates in a step, by collective.
    """

    run: Run
    traffic: dict[str, dict[str, dict[str, int]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its JSON file.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    settings = Settings(
        size=options.size,
        batch=options.batch,
        tokens=options.tokens,
        density=options.density,
        stage_steps=options.stage_steps,
        cycles=options.cycles,
        warmup=options.warmup,
        threads=options.threads,
    )
    before = load()
    measured = measure(options.processes, settings, options.engines)
    ratios = step_ratios(measured.run, comparisons(options.engines))
    selection = selection_costs(options.entries, options.density, options.repeats)
    document = {
        "machine": {**describe_machine(), "load_before": before, "load_after": load()},
        "versions": list_versions(),
        "settings": {**asdict(settings), "processes": options.processes, "backend": "gloo"},
        "step_ratios": [asdict(ratio) for ratio in ratios],
        "seconds": {
            name: {
                figure: asdict(Spread.of(seconds(measured.run, name, figure, lambda times: times.seconds)))
                for figure in FIGURES
            }
            for name in measured.run.summaries
        },
        "traffic_bytes": measured.traffic,
        "selection": selection,
        "rounds": [asdict(each) for each in measured.run.rounds],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for ratio in ratios:
        spread = f"{ratio.step.median:.3f} ({ratio.step.lower:.3f} to {ratio.step.upper:.3f})"
        print(f"{ratio.variant} beside {ratio.against}, {ratio.figure}: {spread}")
    print(f"All numbers are in {options.out}.")


def measure(processes: int, settings: Settings, engines: Sequence[str]) -> Measured:
    """Train all variants in turn in some processes.

    Args:
        processes: How many.
        settings: Settings of the run.
        engines: Names of the engines.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers = [
            context.Process(target=_work, args=(there, store, rank, processes, settings, engines), daemon=True)
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        there.close()  # so that workers that die end the connection
        try:
            measured: Measured = here.recv()
        finally:
            for worker in workers:
                worker.join()
    return measured


def _work(
    connection: Connection, store: str, rank: int, size: int, settings: Settings, engines: Sequence[str]
) -> None:
    quieten()
    torch.set_num_threads(settings.threads or 1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    trainees = {
        name: Trainee(variant, settings, ENGINES[engine])
        for engine in engines
        for name, variant in variants_on(engine).items()
    }
    rounds = []
    for number in range(1, settings.rounds + 1):
        stage, times = stage_of(number, settings.stage_steps), {}
        for name in turned(list(trainees), number):
            dist.barrier()
            times[name] = trainees[name].step(stage)
        rounds.append(Round(number, figure_of(number, settings.stage_steps), number <= settings.warmup, times))
    traffic = _count(trainees, settings)
    if rank == 0:
        summaries = {name: trainee.finish() for name, trainee in trainees.items()}
        connection.send(Measured(Run(torch.get_num_threads(), rounds, summaries), traffic))
    dist.barrier()
    # Taking the group down may deadlock in torch: its destructor waits for gloo's thread, which waits for the GIL.
    os._exit(0)


def _count(trainees: dict[str, Trainee], settings: Settings) -> dict[str, dict[str, dict[str, int]]]:
    """Count what is communicated in one more cycle, whose times nobody takes."""
    traffic: dict[str, dict[str, dict[str, int]]] = {name: {} for name in trainees}
    for number in range(settings.rounds + 1, settings.rounds + 2 * settings.stage_steps + 1):
        stage, figure = stage_of(number, settings.stage_steps), figure_of(number, settings.stage_steps)
        for name, trainee in trainees.items():
            traffic[name][figure] = traffic_of(partial(trainee.step, stage))
    return traffic


def selection_costs(sizes: Sequence[int], density: float, repeats: int) -> list[dict[str, Any]]:
    """Time selections of several sizes on one process, in turn.

    Args:
        sizes: Numbers of entries.
        density: Fraction to select.
        repeats: How often each.

    Returns:
        Per size, the seconds, and the nanoseconds per entry: where they stay, the cost is linear.
    """
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(size, generator=generator).square_() for size in sizes]
    taken: list[list[float]] = [[] for _ in sizes]
    for repeat in range(repeats + 1):
        for each, times in zip(scores, taken, strict=True):
            start = time.perf_counter()
            select(each, density)
            if repeat > 0:  # the first warms up
                times.append(time.perf_counter() - start)
    return [
        {
            "entries": size,
            "seconds": asdict(Spread.of(times)),
            "nanoseconds_per_entry": Spread.of(times).median / size * 1e9,
        }
        for size, times in zip(sizes, taken, strict=True)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="processes")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="engines")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the encoder")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch of one process")
    parser.add_argument("--tokens", type=int, default=32, help="tokens in a sequence")
    parser.add_argument("--density", type=float, default=DENSITY, help="fraction of entries in the subnetwork")
    parser.add_argument("--stage-steps", type=int, default=4, help="steps in a stage, at least 2")
    parser.add_argument("--cycles", type=int, default=8, help="cycles to train")
    parser.add_argument("--warmup", type=int, default=2, help="first steps to leave out of the figures")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument(
        "--entries", type=int, nargs="+", default=[1 << 22, 1 << 23, 1 << 24], help="entries of the selections"
    )
    parser.add_argument("--repeats", type=int, default=9, help="selections of each size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling_gloo.json"), help="JSON file")
    return parser


if __name__ == "__main__":
    main()
