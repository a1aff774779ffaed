"""Writes a result file as a comparison would: no model is trained, the numbers are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import append
from peft_dps.compare.runs.run import Candidate, Evaluation, Run, Selection, Timing
from peft_dps.compare.settings import Settings

SEEDS = (0, 1, 2, 3, 4)
STEPS, STAGE_STEPS = 120, 12
RATES = (3e-5, 1e-4, 3e-4)
TASKS: dict[str, tuple[int | None, list[str], list[str], float]] = {
    "movie": (500, ["accuracy"], ["movie", "amazon", "nyt", "tweets"], 0.80),
    "cola": (None, ["matthews"], ["cola"], 0.38),
    "mrpc": (500, ["accuracy", "f1"], ["mrpc"], 0.74),
}
# Title, gain over full FT, trained entries, memory in MiB, step time.
METHODS = {
    "full": ("full FT", 0.0, 22_713_600, 640, 1.0),
    "full-nodropout": ("full FT, no dropout", -0.002, 22_713_600, 612, 0.97),
    "lora": ("LoRA", -0.006, 443_000, 310, 0.71),
    "bitfit": ("BitFit", -0.035, 52_000, 240, 0.66),
    "houlsby": ("Houlsby adapters", -0.012, 610_000, 330, 0.78),
    "pfeiffer": ("Pfeiffer adapters", -0.014, 300_000, 300, 0.73),
    "dps-dense": ("DPS Dense", 0.006, 22_713_600, 790, 1.03),
    "dps-dense-nodropout": ("DPS Dense, no dropout", 0.004, 22_713_600, 760, 1.0),
    "dps-mix": ("DPS Mix", 0.011, 22_713_600, 830, 1.06),
    "random-mask": ("random mask", 0.002, 22_713_600, 790, 1.02),
}
MATRICES = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
WEIGHTS = [f"bert.encoder.layer.{layer}.{name}" for layer in range(6) for name in MATRICES]
WEIGHTS += ["bert.pooler.dense", "classifier"]


def records() -> Iterator[Run | Timing]:
    """Yield the records of three tasks: one run failed, one seed is missing, one run gave no number."""
    for task, (size, metrics, domains, level) in TASKS.items():
        for number, method in enumerate(METHODS):
            for seed in SEEDS:
                if (task, method, seed) == ("cola", "pfeiffer", 4):
                    continue
                rng = np.random.default_rng([len(task), number, seed])
                plan = Plan(
                    method, RATES[1], task, seed, "all-MiniLM-L6-v2", size, settings=Settings(), data=f"d{seed}"
                )
                if (task, method, seed) == ("mrpc", "houlsby", 2):
                    error = "RuntimeError: <b>out of memory</b> | tried to allocate 2 GiB"
                    yield Run(plan, METHODS[method][0], error)
                    continue
                run = _run(plan, metrics, domains, level, rng)
                if (task, method, seed) == ("cola", "bitfit", 1):
                    run.scores["cola"]["matthews"] = math.nan
                yield run
        rounds = np.random.default_rng(7).lognormal(0, 0.03, (16, len(METHODS)))
        yield Timing(
            "all-MiniLM-L6-v2",
            task,
            16,
            32,
            {name: [float(x) for x in 0.4 * METHODS[name][4] * rounds[:, i]] for i, name in enumerate(METHODS)},
        )


def write(path: Path) -> Path:
    """Write the records to a result file, with a trial run that is not to be reported."""
    for record in records():
        append(record, path)
    append(Run(Plan("lora", RATES[0], "cola", 0, "all-MiniLM-L6-v2", phase="tune")), path)
    return path


def _run(plan: Plan, metrics: list[str], domains: list[str], level: float, rng: np.random.Generator) -> Run:
    title, gain, trainable, memory, step_time = METHODS[plan.method]
    hard = np.random.default_rng(plan.seed).normal(0, 0.008)  # what a seed does to all methods
    final = level + gain + hard + rng.normal(0, 0.006)
    seconds = STEPS * 0.4 * step_time * rng.lognormal(0, 0.02)
    fraction = np.arange(1, 11) / 10
    is_dps = plan.method.startswith(("dps", "random"))
    curve = final - 0.2 * np.exp(-5 * fraction) + rng.normal(0, 0.004, 10)
    losses = 0.25 + 0.5 * np.exp(-np.arange(STEPS) / 40) + rng.normal(0, 0.05, STEPS)
    return Run(
        plan=plan,
        title=title,
        metrics=metrics,
        scores={
            domain: {
                metric: float(final - 0.05 * k + 0.02 * m + rng.normal(0, 0.004)) for m, metric in enumerate(metrics)
            }
            for k, domain in enumerate(domains)
        },
        validation=dict.fromkeys(metrics, float(curve[-1])),
        candidates=[Candidate(rate, [0], 0.7, chosen=rate == plan.learning_rate) for rate in RATES],
        config={"frozen": "exact"} if is_dps else {},
        examples={"train": plan.train_size or 8551, "validation": 100, **{f"test/{name}": 500 for name in domains}},
        order=f"order{plan.seed}",
        losses=[float(loss) for loss in losses],
        evaluations=[
            Evaluation(round(STEPS * f), 0.5, float(score)) for f, score in zip(fraction, curve, strict=True)
        ],
        selections=list(_selections(plan, rng)) if is_dps else [],
        fractions=_fractions(rng) if plan.method in ("dps-mix", "dps-dense-nodropout") else {},
        frozen_moved=False if is_dps else None,
        trainable=trainable,
        selected=15_100_000 if is_dps else None,
        seconds=float(seconds),
        peak_memory=int((memory + rng.normal(0, 4)) * 2**20),
        memory_kind="resident",
        file_size=trainable * 4,
        started="2026-01-01T00:00:00+00:00",
        versions={"python": "3.11.0", "torch": "2.13.0", "peft": "0.21.2"},
        hardware={"system": "Linux x86_64", "cores": 2, "memory": 8 * 2**30, "gpu": None},
    )


def _selections(plan: Plan, rng: np.random.Generator) -> Iterator[Selection]:
    for cycle in range(1, STEPS // (2 * STAGE_STEPS) + 1):
        first = (2 * cycle - 1) * STAGE_STEPS + 1
        selection = Selection(cycle, first, first + STAGE_STEPS - 1)
        stays = 0.18 + (0 if plan.method == "random-mask" else 0.2 + 0.02 * cycle) + float(rng.normal(0, 0.01))
        yield selection if cycle == 1 else replace(selection, overlap=[stays, stays - 0.05, stays + 0.1], chance=0.18)


def _fractions(rng: np.random.Generator) -> dict[str, float]:
    """Fractions of what one threshold over all weights selects."""
    fractions = {}
    for index, name in enumerate(WEIGHTS):
        layer, matrix = divmod(index, len(MATRICES))
        fractions[name] = float(np.clip(0.1 + 0.06 * layer + 0.05 * matrix + rng.normal(0, 0.01), 0.01, 0.95))
    return fractions
