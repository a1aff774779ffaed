"""What methods cost on one accelerator, each beside full fine-tuning: `python -m benchmarks.device --out FILE`.

Full fine-tuning and one method after the other are in memory together. They take their steps in turn, and a ratio is
taken between two steps of the same round. Everything is synchronized before a time is taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
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
        self.steps = 0
        self.kept = 0

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
        """Train one step and return its seconds."""
        synchronize()
        start = time.perf_counter()
        self.step()
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
        cycles: Cycles of DPS; others take as many rounds as half of them have.

    Returns:
        Per figure, seconds and ratios, peak and kept bytes, and waits; JSON-ready.
    """
    device, others = settings.device, allocated(settings.device)
    trainee = Trainee(method, settings, plan)
    rounds = plan.stage_steps * cycles * (2 if method.stages else 1)
    own, ratios, peaks, kept = defaultdict(list), defaultdict(list), defaultdict(int), defaultdict(int)
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


def measure_all(names: Sequence[str], settings: Settings, plan: Plan, cycles: int) -> dict[str, Any]:
    """Measure methods on one model, full fine-tuning first; what fails is told and left out."""
    results: dict[str, Any] = {FULL: measure(METHODS[FULL], None, settings, plan, cycles)}
    gc.collect()
    full = Trainee(METHODS[FULL], settings, plan)
    full.timed()
    for name in names:
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()
        try:
            results[name] = measure(METHODS[name], full, settings, plan, cycles)
        except (RuntimeError, ValueError) as error:  # out of memory, or what PEFT cannot do
            results[name] = {"trains": METHODS[name].trains, "error": f"{type(error).__name__}: {error}"[:300]}
        print(settings.size, name, json.dumps(results[name])[:600], flush=True)
    return results


def profile(name: str, settings: Settings, plan: Plan) -> str:
    """Return the kernels that take the most time in one step of each kind."""
    trainee, parts = Trainee(METHODS[name], settings, plan), []
    activities = [torch.profiler.ProfilerActivity.CPU]
    if settings.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(2 * plan.stage_steps):
        figure = trainee.coming
        with torch.profiler.profile(activities=activities) as found:
            trainee.timed()
        by = "self_cuda_time_total" if settings.device != "cpu" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=18, max_name_column_width=70)
        parts.append(f"{name}, {settings.size}, step {trainee.steps}, {figure}\n{table}\n")
    return "\n".join([*parts[1:2], *parts[plan.stage_steps : plan.stage_steps + 2]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["decoder-0.5b", "decoder-1.5b"], choices=DECODERS)
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != FULL], choices=METHODS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--stage-steps", type=int, default=6)
    parser.add_argument("--cycles", type=int, default=3)
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
    for size in given.models:
        settings = Settings(size=size, batch=given.batch, tokens=given.tokens, dropout=0.0, device=given.device)
        result["models"][size] = measure_all(given.methods, settings, plan, given.cycles)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(result))
        if given.profile:
            text = profile(given.profile, settings, plan)
            given.out.with_name(f"{given.out.stem}_{size}_kernels.txt").write_text(text)
    print(page(result))


if __name__ == "__main__":
    main()
