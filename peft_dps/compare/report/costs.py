"""What each method of an experiment costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.runs.run import Run, Timing


@dataclass(frozen=True)
class Costs:
    """What a method costs: medians over the runs that finished.

    Attributes:
        method: The method.
        learning_rates: The rates it was trained with.
        trainable: Entries that are trained; None without a finished run, as below.
        selected: Entries that are updated in SUBNETWORK; None without DPS.
        step_ratio: Its step time relative to the reference's, measured interleaved; None if it was not.
        peak_memory: In bytes.
        memory_ratio: Peak memory relative to the reference's; None without it.
        file_size: In bytes.
        seconds: Training time.
        steps_to_reference: Steps until the validation score reaches that with which the reference ends on the same
            seed, as the median over the seeds; infinite if half of them or more never do. None without pairs.
        reached: In how many runs it does.
        runs: Of how many.
    """

    method: MethodRuns
    learning_rates: tuple[float, ...]
    trainable: int | None = None
    selected: int | None = None
    step_ratio: float | None = None
    peak_memory: float | None = None
    memory_ratio: float | None = None
    file_size: float | None = None
    seconds: float | None = None
    steps_to_reference: float | None = None
    reached: int = 0
    runs: int = 0


def costs_of(experiment: Experiment) -> list[Costs]:
    """Work out the costs of each method of an experiment."""
    targets = reference_ends(experiment)
    ratios = step_ratios(experiment.timing, experiment.reference_variant) if experiment.timing else {}
    found = [_costs_of_runs(each, targets, step_ratio(each, ratios.get(each.variant))) for each in experiment.methods]
    base = next((each.peak_memory for each in found if each.method is experiment.reference), None)
    return [
        replace(each, memory_ratio=each.peak_memory / base) if base and each.peak_memory else each for each in found
    ]


def reference_ends(experiment: Experiment) -> dict[int, float]:
    """Return per seed the reference's validation score at the end of training, where there is one."""
    runs = experiment.reference.finished if experiment.reference else []
    ends = {run.plan.seed: run.evaluations[-1].score for run in runs if run.evaluations}
    return {seed: score for seed, score in ends.items() if not math.isnan(score)}


def timed_against(timing: Timing, reference: str) -> str:
    """Return the variant whose steps are the measure: the reference if it was timed, else the first one."""
    return reference if timing.seconds.get(reference) else next(iter(timing.seconds), "")


def step_ratios(timing: Timing, reference: str) -> dict[str, list[float]]:
    """Return per variant and round its step time divided by that of the measure.

    Args:
        timing: Step times, measured interleaved.
        reference: The variant that is the measure if it was timed.
    """
    measure = timing.seconds.get(timed_against(timing, reference), [])
    rounds = {name: list(zip(times, measure, strict=False)) for name, times in timing.seconds.items()}
    return {name: [own / other for own, other in pairs] for name, pairs in rounds.items() if pairs}


def step_ratio(method: MethodRuns, ratios: Sequence[float] | None) -> float | None:
    """Return the median of a method's ratios; in cycles the mean of those of both stages, half the rounds each."""
    if not ratios:
        return None
    if len(ratios) < 2 or not any(run.config.get("schedule") == "cycle" for run in method.finished):
        return statistics.median(ratios)
    half = len(ratios) // 2
    return statistics.fmean([statistics.median(ratios[:half]), statistics.median(ratios[half:])])


def _costs_of_runs(method: MethodRuns, targets: Mapping[int, float], step_ratio: float | None) -> Costs:
    runs = method.finished
    rates = tuple(sorted({run.plan.learning_rate for run in method.runs.values()}))
    if not runs:
        return Costs(method, rates, step_ratio=step_ratio)
    selected = [run.selected for run in runs if run.selected is not None]
    paired = [run for run in runs if run.plan.seed in targets and run.evaluations]
    steps = [_steps_until(targets[run.plan.seed], run) for run in paired]
    return Costs(
        method=method,
        learning_rates=rates,
        trainable=round(statistics.median(run.trainable for run in runs)),
        selected=round(statistics.median(selected)) if selected else None,
        step_ratio=step_ratio,
        peak_memory=statistics.median(run.peak_memory for run in runs),
        file_size=statistics.median(run.file_size for run in runs),
        seconds=statistics.median(run.seconds for run in runs),
        steps_to_reference=statistics.median(steps) if steps else None,
        reached=sum(taken < math.inf for taken in steps),
        runs=len(steps),
    )


def _steps_until(target: float, run: Run) -> float:
    return next((look.step for look in run.evaluations if look.score >= target), math.inf)
