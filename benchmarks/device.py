"""What methods cost on one accelerator, each beside full fine-tuning: `python -m benchmarks.device --out FILE`.

Full fine-tuning and one method after the other are in memory together. They take their steps in turn, and a ratio is
taken between two steps of the same round. Everything is synchronized before a time is taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.device_methods import FULL, METHODS, Method, Plan
from benchmarks.device_page import page
from benchmarks.machine import describe_machine, list_versions
from benchmarks.models import build_model, make_batch
from benchmarks.rounds import FIGURES, figure_of
from benchmarks.settings import DECODERS, Settings
from peft_dps.compare.runs.dps import status_of
from peft_dps.compare.runs.machine import synchronize

STEP = "step"  # what counts for a method without stages
_WARMUP = 3  # rounds that make optimizer state and load kernels


class Trainee:
    """One method's model, batch and optimizer.

    Args:
        method: The method.
        settings: Names the model, the batch and the device.
        plan: What methods have in common.
    """

    def __init__(self, method: Method, settings: Settings, plan: Plan) -> None:
        self.method, self.device = method, settings.device
        model = build_model(settings).to(torch.bfloat16)
        self.model = method.prepare(model, plan).train()
        self.batch = {name: value for name, value in make_batch(settings).items() if name != "attention_mask"}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01, fused=True)
        self.stage_steps = plan.stage_steps
        self.steps = self.kept = 0
        self.host = 0.0

    @property
    def coming(self) -> str:
        """What the next step counts for."""
        return figure_of(self.steps + 1, self.stage_steps) if self.method.stages else STEP

    def step(self) -> None:
        """Train one step."""
        before = allocated(self.device)
        loss = self.model(**self.batch).loss
        self.kept = allocated(self.device) - before
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def timed(self) -> float:
        """Train one step and return its seconds; `host` is how long the host took to ask for all of it."""
        synchronize()
        start = time.perf_counter()
        self.step()
        self.host = time.perf_counter() - start
        synchronize()
        return time.perf_counter() - start


def allocated(device: str) -> int:
    """Return the bytes that are handed out on the device."""
    return 0 if device == "cpu" else torch.cuda.memory_allocated()


def waits_in(work: Callable[[], object], device: str) -> Counter[str]:
    """Count where torch waited for the device.

    Args:
        work: What to do.
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        work()
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (
        f"{Path(each.filename).name}:{each.lineno}" for each in found if "called a synchronizing" in str(each.message)
    )
    return Counter(places)


def measure(method: Method, full: Trainee | None, settings: Settings, plan: Plan, cycles: int) -> dict[str, Any]:
    """Train a method beside full fine-tuning.

    Args:
        method: The method.
        full: Full fine-tuning; None if that is the method itself.
        settings: Names the model, the batch and the device.
        plan: What methods have in common.
        cycles: Cycles of DPS; others take as many rounds.

    Returns:
        Per figure, seconds and ratios, peak and kept bytes, and waits; JSON-ready.
    """
    device, others = settings.device, allocated(settings.device)
    trainee = Trainee(method, settings, plan)
    rounds = 2 * plan.stage_steps * cycles
    own, host, ratios = (defaultdict(list) for _ in range(3))
    peaks, kept = defaultdict(int), defaultdict(int)
    for number in range(rounds):
        other = None if full is None else full.timed()
        figure = trainee.coming
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds = trainee.timed()
        if device != "cpu":
            peaks[figure] = max(peaks[figure], torch.cuda.max_memory_allocated() - others)
        kept[figure] = trainee.kept
        if number >= _WARMUP:
            own[figure].append(seconds)
            host[figure].append(trainee.host)
            ratios[figure].append(1.0 if other is None else seconds / other)
    live = allocated(device) - others
    waits: dict[str, Counter[str]] = {}
    for _ in range(2 * plan.stage_steps if method.stages else 1):
        figure = trainee.coming
        waits[figure] = waits_in(trainee.step, device)
    status = status_of(trainee.model)
    return {
        "trains": method.trains,
        "trained_entries": trainee.trained,
        "live": live,
        "engaged": None if status is None else status.engaged,
        "frozen_moved": None if status is None else status.frozen_moved,
        "figures": {
            figure: {
                "seconds": median(own[figure]),
                "host": median(host[figure]),
                "ratio": median(ratios[figure]),
                "ratios": [round(ratio, 4) for ratio in ratios[figure]],
                "peak": peaks[figure],
                "kept": kept[figure],
                "waits": waits[figure].total(),
                "waits_in": dict(waits[figure].most_common(8)),
            }
            for figure in (STEP, *FIGURES)
            if own[figure]
        },
    }


def measure_all(
    names: Sequence[str], settings: Settings, plan: Plan, cycles: int, until: float
) -> Iterator[dict[str, Any]]:
    """Measure methods on one model, full fine-tuning first; what fails, or has no time left, is told and left out.

    Args:
        names: The methods.
        settings: Names the model, the batch and the device.
        plan: What methods have in common.
        cycles: See `measure`.
        until: When no more methods are begun, by `time.monotonic`.

    Yields:
        Per method what was found, after each of them.
    """
    results: dict[str, Any] = {FULL: measure(METHODS[FULL], None, settings, plan, cycles)}
    gc.collect()
    full = Trainee(METHODS[FULL], settings, plan)
    full.timed()
    for name in names:
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()
        start = time.monotonic()
        try:
            if start > until:
                raise RuntimeError("there was no time left for it")
            results[name] = measure(METHODS[name], full, settings, plan, cycles)
        except (RuntimeError, ValueError) as error:  # out of memory, or what PEFT cannot do
            results[name] = {"trains": METHODS[name].trains, "error": f"{type(error).__name__}: {error}"[:300]}
        print(f"{settings.size} {name}: {time.monotonic() - start:.0f} s", flush=True)
        yield results


def profile(name: str, settings: Settings, plan: Plan) -> str:
    """Return the kernels that take the most time in one step of each kind."""
    trainee, seen = Trainee(METHODS[name], settings, plan), {}
    on_cpu = settings.device == "cpu"
    activities = [torch.profiler.ProfilerActivity.CPU if on_cpu else torch.profiler.ProfilerActivity.CUDA]
    for number in range(plan.stage_steps + 2):
        figure = trainee.coming
        if number == 0 or figure in seen:
            trainee.step()
            continue
        with torch.profiler.profile(activities=activities) as found:
            trainee.timed()
        by = "self_cpu_time_total" if on_cpu else "self_cuda_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=18, max_name_column_width=70)
        seen[figure] = f"{name}, {settings.size}, step {trainee.steps}, {figure}\n{table}\n"
    return "\n".join(seen.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["decoder-0.5b", "decoder-1.5b"], choices=DECODERS)
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != FULL], choices=METHODS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--stage-steps", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no more methods are begun")
    parser.add_argument("--profile", metavar="METHOD", help="also write the kernels of a method beside --out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes beside it")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    plan = Plan(given.density, given.stage_steps)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),  # noqa: DTZ011
        "machine": describe_machine(),
        "device": "cpu" if given.device == "cpu" else torch.cuda.get_device_name(),
        "versions": list_versions(),
        "settings": {name: value for name, value in vars(given).items() if name not in ("out", "profile")},
        "models": {},
    }
    start = time.monotonic()
    for place, size in enumerate(given.models, 1):
        settings = Settings(size=size, batch=given.batch, tokens=given.tokens, dropout=0.0, device=given.device)
        until = start + given.seconds * place / len(given.models)
        for found in measure_all(given.methods, settings, plan, given.cycles, until):
            result["models"][size] = found
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    if given.profile:
        given.out.with_name(f"{given.out.stem}_kernels.txt").write_text(profile(given.profile, settings, plan))
    given.out.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
