"""The numbers of a report as CSV: floats with six decimals, what is not known as an empty cell."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from peft_dps.compare.report.costs import costs_of
from peft_dps.compare.report.experiment import Experiment, MethodRuns
from peft_dps.compare.report.retention import measures_of
from peft_dps.compare.report.scores import method_scores

FILES = ("scores.csv", "retention.csv", "runs.csv")
"""What a report may have; "retention.csv" with probes alone."""
Row = dict[str, object]


def csv_files(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return the text of every file by its name; scores as they are, not in points; bytes and seconds."""
    rows = (_score_rows(experiments), _retention_rows(experiments), _run_rows(experiments))
    files = {name: to_csv(each) for name, each in zip(FILES, rows, strict=True)}
    return {name: text for name, text in files.items() if text}


def to_csv(rows: Iterable[Row]) -> str:
    """Write rows of the same columns as CSV.

    Args:
        rows: Values by column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        if not number:
            writer.writerow(row)
        writer.writerow([_cell(value) for value in row.values()])
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return value


def _columns(item: object, *names: str) -> Row:
    """Columns from attributes; `column=attribute` where their names differ."""
    pairs = [name.partition("=") for name in names]
    return {column: getattr(item, attribute or column) for column, _, attribute in pairs}


def _place(experiment: Experiment, method: MethodRuns) -> Row:
    where = _columns(experiment, "task", "train_size", "model", "experiment=name")
    return {**where, **_columns(method, "method=variant", "title")}


def _score_rows(experiments: Sequence[Experiment]) -> Iterable[Row]:
    """A row per experiment, test domain and method; the costs of a method stand in the row of its own domain."""
    for experiment in experiments:
        costs = {each.method.variant: each for each in costs_of(experiment)}
        for domain in experiment.domains:
            for each in method_scores(experiment, domain):
                low, high = each.interval or (None, None)
                row = {
                    **_place(experiment, each.method),
                    "domain": domain,
                    "in_domain": int(domain == experiment.domains[0]),
                    "metric": experiment.metric,
                    "finished": len(each.values),
                    "failed": each.failed,
                    "missing": len(each.missing),
                    **_columns(each, "mean", "std=deviation"),
                    "low": low,
                    "high": high,
                    **_columns(each, "difference", "pairs", "p", "p_holm=corrected_p", "mean_rank=rank"),
                }
                cost = _columns(
                    costs[each.method.variant],
                    *("trainable", "selected", "step_ratio", "seconds", "steps_to_reference"),
                    *("peak_memory", "file_size"),
                )
                yield {**row, **(cost if row["in_domain"] else dict.fromkeys(cost))}


def _retention_rows(experiments: Sequence[Experiment]) -> Iterable[Row]:
    """A row per experiment, measure of retention and method, in the unit of the measure."""
    for experiment in experiments:
        for measure in measures_of(experiment):
            for each in method_scores(experiment, measure.place):
                low, high = sorted(map(measure.natural, each.interval)) if each.interval else (None, None)
                yield {
                    **_place(experiment, each.method),
                    "measure": measure.title,
                    "metric": measure.metric,
                    "before": None if measure.before is None else measure.natural(measure.before),
                    "mean": measure.natural(each.mean),
                    "low": low,
                    "high": high,
                    "difference": None if each.difference is None else measure.natural(each.difference),
                    **_columns(each, "std=deviation", "pairs", "p", "p_holm=corrected_p", "mean_rank=rank"),
                }


def _run_rows(experiments: Sequence[Experiment]) -> Iterable[Row]:
    """A row per run and test domain or probe, failed runs included."""
    for experiment in experiments:
        probes = (each.place for each in measures_of(experiment) if each.before is not None)
        places: list[str | None] = [*experiment.domains, *probes]
        for each in experiment.methods:
            for seed, run in sorted(each.runs.items()):
                for domain in places or [None]:
                    yield {
                        **_place(experiment, each),
                        "domain": domain,
                        "seed": seed,
                        "learning_rate": f"{run.plan.learning_rate:g}",
                        "score": None if domain is None else each.scores(domain)[seed],
                        **_columns(run, "validation_score", "seconds", "peak_memory", "file_size"),
                        "key": run.plan.key,
                        "error": run.error,
                    }
