"""The tables of a report, from its experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from peft_dps.compare.report import formatting
from peft_dps.compare.report.conclusion import clear_differences
from peft_dps.compare.report.costs import Costs, costs_of, timed_against
from peft_dps.compare.report.experiment import Experiment, without_dropout
from peft_dps.compare.report.formatting import NONE, p_value, points
from peft_dps.compare.report.scores import MethodScores, OverallScores, method_scores, overall_scores
from peft_dps.compare.report.table import Table
from peft_dps.compare.runs.run import Run


def score_table(experiment: Experiment, domain: str) -> Table:
    """Lay out how the methods stand on one test domain."""
    found = method_scores(experiment, domain)
    base = experiment.reference_title
    others = (
        ""
        if len(experiment.domains) == 1
        else " (in domain)"
        if domain == experiment.domains[0]
        else " (out of domain)"
    )
    place = domain if domain == experiment.task else f"{experiment.task}, tested on {domain}"
    columns: dict[str, Callable[[MethodScores], str]] = {
        "method": lambda each: each.method.title,
        "seeds": _seed_counts,
        "mean": lambda each: points(each.mean),
        "std": lambda each: points(each.deviation),
        "95% interval": lambda each: " to ".join(map(points, each.interval)) if each.interval else NONE,
        f"vs {base}": lambda each: points(each.difference, sign=True),
        "p": lambda each: p_value(each.p),
        "p (Holm)": lambda each: p_value(each.corrected_p),
        "mean rank": lambda each: f"{each.rank:.2f}",
    }
    notes = (_verdict(found, base), *_like_for_like([experiment], lambda alike: method_scores(alike[0], domain)))
    notes += tuple(_chosen_once([experiment])) if domain == experiment.domains[0] else ()
    title = f"{place}{others}: 100 x {experiment.metric}"
    return Table.of(title, columns, found, notes=notes, best=_highest(found))


def cost_table(experiment: Experiment) -> Table:
    """Lay out what the methods cost."""
    costs, base = costs_of(experiment), experiment.reference_title
    notes = tuple(_cost_notes(experiment, costs, base))
    return Table.of(f"{experiment.name}: costs", _cost_columns(experiment, base), costs, notes=notes)


def _cost_columns(experiment: Experiment, base: str) -> dict[str, Callable[[Costs], str]]:
    """Per column, what it says of a method."""
    memory = sorted({run.memory_kind for run in experiment.runs if run.memory_kind})
    kinds = f" ({', '.join(memory)})" if memory else ""
    return {
        "method": lambda each: each.method.title,
        "learning rate": lambda each: ", ".join(f"{rate:g}" for rate in each.learning_rates),
        "entries trained": lambda each: formatting.entries(each.trainable),
        "of them in SUBNETWORK": lambda each: formatting.entries(each.selected),
        f"steps to score of {base}": _steps_cell,
        "step time": lambda each: formatting.ratio(each.step_ratio),
        "training time": lambda each: formatting.seconds(each.seconds),
        f"peak memory{kinds}": lambda each: formatting.mebibytes(each.peak_memory),
        "file size": lambda each: formatting.mebibytes(each.file_size),
    }


def _cost_notes(experiment: Experiment, costs: Sequence[Costs], base: str) -> Iterator[str]:
    settings = experiment.runs[0].plan.settings
    mixed = " (mixed precision)" if settings.precision == "bf16" else ""
    yield f"Trained in {settings.precision}{mixed}, {settings.batch_size} examples a step, {settings.epochs:g} epochs."
    if not experiment.timing:
        yield "Training time is that of the wall clock: it tells little where runs shared a machine."
    if experiment.timing:
        titles = {each.variant: each.title for each in experiment.methods}
        measure = timed_against(experiment.timing, experiment.reference_variant)
        rounds = min(map(len, experiment.timing.seconds.values()), default=0)
        yield (
            f"Step time: relative to {titles.get(measure, measure)}, median of {rounds} rounds in which each method "
            f"took one step in turn, of {experiment.timing.batch_size} examples of {experiment.timing.tokens} tokens. "
            "In cycles it is the mean of both stages; of methods that select once, a step after the selection."
        )
    if any(each.steps_to_reference is not None for each in costs):
        yield (
            f"Steps to score: until the validation score first reaches that with which {base} ends on the same seed, "
            "median over the runs; in brackets, how many runs reach it."
        )


def overall_table(experiments: Sequence[Experiment]) -> Table:
    """Lay out how the methods stand over all experiments, best mean rank first."""
    found = sorted(overall_scores(experiments), key=lambda each: (-each.experiments, each.rank))
    base = next((each for each in experiments if each.reference), experiments[0]).reference_title
    columns: dict[str, Callable[[OverallScores], str]] = {
        "method": lambda each: each.method.title,
        "tasks": lambda each: str(each.experiments),
        "mean rank": lambda each: f"{each.rank:.2f}",
        f"vs {base}": lambda each: points(each.difference, sign=True),
        "tasks better": lambda each: f"{each.better} of {each.experiments}" if each.pairs else NONE,
        "pairs": lambda each: str(each.pairs) if each.pairs else NONE,
        "p": lambda each: p_value(each.p),
        "p (Holm)": lambda each: p_value(each.corrected_p),
        "runs": lambda each: str(each.finished),
        "failed": lambda each: str(each.failed or NONE),
    }
    notes = (*_chosen_once(experiments), *_like_for_like(experiments, overall_scores))
    return Table.of("All tasks together, each in its own domain", columns, found, notes=notes)


def facts_of(experiments: Sequence[Experiment]) -> list[tuple[str, str]]:
    """Say what was compared and when, as pairs of a name and a text."""
    days = sorted({run.started[:10] for each in experiments for run in each.runs} - {""})
    facts = [("date", " to ".join(dict.fromkeys((days[0], days[-1]))))] if days else []
    facts.append(("model", ", ".join(dict.fromkeys(each.model for each in experiments))))
    named = [f"{each.name}{_test_sizes(each)}" for each in experiments]
    return [*facts, ("data", "; ".join(named))]


def _test_sizes(experiment: Experiment) -> str:
    sizes = next((run.examples for run in experiment.runs if run.examples), {})
    tests = [f"{name.removeprefix('test/')} {size:,}" for name, size in sizes.items() if name.startswith("test/")]
    return f" (tested on {', '.join(tests)})" if tests else ""


def setup_of(experiment: Experiment) -> list[tuple[str, str]]:
    """Say how the runs of an experiment were made, as pairs of a name and a text."""
    runs = [run for run in experiment.runs if not run.failed] or experiment.runs
    given = {name: value for name, value in asdict(runs[0].plan.settings).items() if value is not None}
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    sizes = runs[0].examples
    return [
        ("model", experiment.model),
        ("budget of every method", settings),
        ("examples", ", ".join(f"{name}: {count:,}" for name, count in sizes.items())),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("hardware", _each(runs, "hardware")),
        ("versions", _each(runs, "versions")),
        ("protocol", str(runs[0].plan.protocol)),
    ]


def _each(runs: Iterable[Run], field: str) -> str:
    def describe(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {_readable(name, value)}" for name, value in values.items() if value is not None)

    return "; or ".join(dict.fromkeys(describe(getattr(run, field)) for run in runs))


def _readable(name: str, value: Any) -> str:
    return f"{value / 2**30:.0f} GiB" if name == "memory" and isinstance(value, int) else str(value)


def _verdict(found: Sequence[MethodScores], base: str) -> str:
    highest = [found[index] for index in sorted(_highest(found))]
    if not highest:
        return "No run finished."
    said = clear_differences(found, base)
    titles = " and ".join(each.method.title for each in highest)
    return f"Highest mean: {titles}, {points(highest[0].mean)}. {said[0].upper()}{said[1:]}."


def _like_for_like(
    experiments: Sequence[Experiment],
    stand: Callable[[list[Experiment]], Sequence[MethodScores | OverallScores]],
) -> list[str]:
    """How the methods without dropout stand beside full fine-tuning without it."""
    alike = [found for found in map(without_dropout, experiments) if found is not None]
    if not alike:
        return []
    tested = [each for each in stand(alike) if each.p is not None]
    said = "; ".join(
        f"{each.method.title} {points(each.difference, sign=True)} (p {p_value(each.p)}, "
        f"Holm {p_value(each.corrected_p)})"
        for each in tested
    )
    if not tested:
        return []
    place = f", on {len(alike)} of {len(experiments)} tasks" if len(alike) < len(experiments) else ""
    return [f"Like for like, beside {alike[0].reference_title}{place}: {said}."]


def _chosen_once(experiments: Sequence[Experiment]) -> list[str]:
    runs_of = [
        experiment.runs for experiment in experiments if len({run.plan.learning_rate for run in experiment.runs}) > 1
    ]
    if not any(len(run.candidates) > 1 for runs in runs_of for run in runs):
        return []
    said = "p takes learning rates as given: each method's was chosen once a task, so its pairs there share that luck."
    return [said]


def _highest(found: Sequence[MethodScores]) -> frozenset[int]:
    means = [points(each.mean) for each in found]
    known = [each.mean for each in found if each.values]
    return frozenset(index for index, mean in enumerate(means) if known and mean == points(max(known)))


def _seed_counts(scores: MethodScores) -> str:
    notes = [f"{scores.failed} failed"] if scores.failed else []
    if scores.missing:
        notes.append(f"{len(scores.missing)} missing")
    return f"{len(scores.values)}" + (f" ({', '.join(notes)})" if notes else "")


def _steps_cell(costs: Costs) -> str:
    if costs.steps_to_reference is None:
        return NONE
    return f"{formatting.count(costs.steps_to_reference)} ({costs.reached} of {costs.runs})"
