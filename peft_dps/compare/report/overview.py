"""An experiment at a glance: the table that the terminal shows and a report begins with."""

from __future__ import annotations

from collections.abc import Callable

from peft_dps.compare.report.costs import Costs, costs_of
from peft_dps.compare.report.experiment import Experiment
from peft_dps.compare.report.formatting import NONE, entries, mebibytes, points, ratio
from peft_dps.compare.report.retention import measures_of
from peft_dps.compare.report.scores import MethodScores, method_scores
from peft_dps.compare.report.table import Table


def overview_table(experiment: Experiment) -> Table:
    """Lay out one row per method: its score on every test domain, then what it costs."""
    columns: dict[str, Callable[[Costs], str]] = {"method": lambda each: each.method.title}
    for index, domain in enumerate(experiment.domains):
        found = {each.method.variant: _mean_and_spread(each) for each in method_scores(experiment, domain)}
        place = domain if index or len(experiment.domains) == 1 else f"{domain} (in domain)"
        columns[place] = lambda each, found=found: found[each.method.variant]  # type: ignore[misc]
    for measure in (each for each in measures_of(experiment) if each.before is not None):
        kept = {each.method.variant: measure.show(each.mean) for each in method_scores(experiment, measure.place)}
        columns[f"kept: {measure.title}"] = lambda each, kept=kept: kept[each.method.variant]  # type: ignore[misc]
    columns["entries trained"] = lambda each: entries(each.trainable)
    failed = {each.variant: sum(run.failed for run in each.runs.values()) for each in experiment.methods}
    if any(failed.values()):
        columns["failed runs"] = lambda each: str(failed[each.method.variant])
    columns["step time"] = lambda each: ratio(each.step_ratio)
    columns["peak memory"] = lambda each: mebibytes(each.peak_memory)
    columns["file size"] = lambda each: mebibytes(each.file_size)
    seeds = len(experiment.seeds)
    spread = f", mean ± std over {seeds} seeds" if seeds > 1 else ""
    notes = (*_uncertainty(experiment), *_proofs(experiment))
    title = f"{experiment.name}: 100 x {experiment.metric}{spread}"
    return Table.of(title, columns, costs_of(experiment), notes=notes)


def _mean_and_spread(scores: MethodScores) -> str:
    if not scores.values:
        return NONE
    spread = f" ± {points(scores.deviation, digits=1)}" if scores.deviation is not None else ""
    return f"{points(scores.mean, digits=1)}{spread}"


def _uncertainty(experiment: Experiment) -> list[str]:
    """What one seed leaves open."""
    examples = [item for run in experiment.runs if not run.failed for item in run.examples.items()]
    sizes = [size for name, size in examples if name.startswith("test/") and size]
    if len(experiment.seeds) > 1 or not sizes:
        return []
    said = f"One seed and {min(sizes):,} or more test examples a domain: "
    if experiment.metrics != ("accuracy",):
        return [f"{said}how far scores vary from seed to seed is not known, so small differences say nothing."]
    margin = 1.96 * (0.25 / min(sizes)) ** 0.5
    return [
        f"{said}each accuracy is uncertain by up to {100 * margin:.1f} points, so smaller differences say nothing."
    ]


def _proofs(experiment: Experiment) -> list[str]:
    """That DPS engaged, in its own words."""
    said: dict[tuple[str, str], list[str]] = {}
    for each in experiment.methods:
        engaged = [run for run in each.finished if run.status and run.selections]
        if engaged:
            runs = f"in {len(engaged)} of {len(each.finished)} runs; with seed {engaged[0].plan.seed}, "
            runs = runs if len(experiment.seeds) > 1 else ""
            said.setdefault((runs, engaged[0].status), []).append(each.title)
    return [
        f"Proof that {'; '.join(titles)} engaged, {runs}at the end of {'its' if len(titles) == 1 else 'their'} last "
        f"SUBNETWORK: {status}."
        for (runs, status), titles in said.items()
    ]
