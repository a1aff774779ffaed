"""The tables of a report, from its contests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from peft_dps.compare import cells
from peft_dps.compare.cells import NONE, p_value, points
from peft_dps.compare.contest import Contest, without_dropout
from peft_dps.compare.costs import Costs, costs_of, timed_against
from peft_dps.compare.run import Run
from peft_dps.compare.sheet import Sheet
from peft_dps.compare.significance import LEVEL, least_p, pairs_needed
from peft_dps.compare.standing import Overall, Standing, overall, standings


def score_sheet(contest: Contest, domain: str) -> Sheet:
    """Lay out how the methods stand on one test domain.

    Args:
        contest: The contest.
        domain: One of its domains.
    """
    found = standings(contest, domain)
    base = contest.reference_title
    where = "in domain" if domain == contest.domains[0] else "out of domain"
    place = domain if domain == contest.task else f"{contest.task}, tested on {domain}"
    return Sheet(
        title=f"{place} ({where}), 100 x {contest.metric}",
        header=("method", "seeds", "mean", "std", "max", "95% interval", f"vs {base}", "p", "p (Holm)", "mean rank"),
        rows=tuple(
            (
                each.contender.title,
                _seeds(each),
                points(each.mean),
                points(each.deviation),
                points(each.best),
                f"{points(each.interval[0])} to {points(each.interval[1])}" if each.interval else NONE,
                points(each.difference, sign=True),
                p_value(each.p),
                p_value(each.corrected_p),
                f"{each.rank:.2f}",
            )
            for each in found
        ),
        notes=(*_verdict(found, base), *_like_for_like([contest], lambda alike: standings(alike[0], domain))),
        best=_highest(found),
    )


def cost_sheet(contest: Contest) -> Sheet:
    """Lay out what the methods cost.

    Args:
        contest: The contest.
    """
    costs = costs_of(contest)
    base = contest.reference_title
    columns = _cost_columns(contest, base)
    return Sheet(
        title=f"{contest.name}: costs",
        header=tuple(columns),
        rows=tuple(tuple(cell(each) for cell in columns.values()) for each in costs),
        notes=tuple(_cost_notes(contest, costs, base)),
    )


def _cost_columns(contest: Contest, base: str) -> dict[str, Callable[[Costs], str]]:
    """Per column, what it says of a method; those of step times only if steps were timed."""
    memory = sorted({run.memory_kind for run in contest.runs if run.memory_kind})
    timed: dict[str, Callable[[Costs], str]] = {
        "step time": lambda each: cells.ratio(each.step_ratio),
        f"time to score of {base}": lambda each: cells.ratio(each.time_to_reference),
    }
    return {
        "method": lambda each: each.contender.title,
        "learning rate": lambda each: ", ".join(f"{rate:g}" for rate in each.learning_rates),
        "entries trained": lambda each: cells.count(each.trainable),
        "of them in SUBNETWORK": lambda each: cells.count(each.selected),
        f"steps to score of {base}": _steps_to,
        **(timed if contest.timing else {}),
        "training time": lambda each: cells.seconds(each.seconds),
        f"peak memory ({', '.join(memory)})" if memory else "peak memory": lambda each: cells.mebibytes(
            each.peak_memory
        ),
        "file size": lambda each: cells.mebibytes(each.file_size),
    }


def _cost_notes(contest: Contest, costs: Sequence[Costs], base: str) -> Iterator[str]:
    settings = contest.runs[0].plan.settings
    mixed = " (mixed precision)" if settings.precision == "bf16" else ""
    yield f"Trained in {settings.precision}{mixed}, {settings.batch_size} examples a step, {settings.epochs:g} epochs."
    if not contest.timing:
        yield "Training time is that of the wall clock: it tells little where runs shared a machine."
    if contest.timing:
        titles = {each.variant: each.title for each in contest.contenders}
        measure = timed_against(contest.timing, contest.reference_variant)
        rounds = min(map(len, contest.timing.seconds.values()), default=0)
        yield (
            f"Step time: relative to {titles.get(measure, measure)}, median of {rounds} rounds in which each method "
            f"took one step in turn, of {contest.timing.batch_size} examples of {contest.timing.tokens} tokens."
        )
    if any(each.steps_to_reference is not None for each in costs):
        yield (
            f"Steps to score: until the validation score first reaches that with which {base} ends on the same seed, "
            "median over the runs; in brackets, how many runs reach it."
        )
    if any(each.time_to_reference is not None for each in costs):
        yield f"Time to score: these steps times the step time, relative to the whole training of {base}."


def overall_sheet(contests: Sequence[Contest]) -> Sheet:
    """Lay out how the methods stand over all contests, best mean rank first.

    Args:
        contests: The contests.
    """
    found = sorted(overall(contests), key=lambda each: (-each.contests, each.rank))
    base = next((each for each in contests if each.reference), contests[0]).reference_title
    return Sheet(
        title="All tasks together, each in its own domain",
        header=(
            "method",
            "tasks",
            "mean rank",
            f"vs {base}",
            "tasks better",
            "pairs",
            "p",
            "p (Holm)",
            "runs",
            "failed",
        ),
        rows=tuple(
            (
                each.contender.title,
                str(each.contests),
                f"{each.rank:.2f}",
                points(each.difference, sign=True),
                f"{each.better} of {each.contests}" if each.pairs else NONE,
                str(each.pairs) if each.pairs else NONE,
                p_value(each.p),
                p_value(each.corrected_p),
                str(each.finished),
                str(each.failed),
            )
            for each in found
        ),
        notes=(*_chosen_once(contests), *_resolution(found), *_like_for_like(contests, overall)),
    )


def setup_of(contest: Contest) -> list[tuple[str, str]]:
    """Say how the runs of a contest were made, as pairs of a name and a text.

    Args:
        contest: The contest.
    """
    runs = [run for run in contest.runs if not run.failed] or contest.runs
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in asdict(runs[0].plan.settings).items()
        if value is not None
    )
    sizes = runs[0].examples
    return [
        ("model", contest.model),
        ("budget of every method", settings),
        ("examples", ", ".join(f"{name}: {count:,}" for name, count in sizes.items())),
        ("seeds", ", ".join(map(str, contest.seeds))),
        ("hardware", _each(runs, "hardware")),
        ("versions", _each(runs, "versions")),
        ("protocol", str(runs[0].plan.protocol)),
    ]


def _each(runs: Iterable[Run], field: str) -> str:
    def describe(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {_plain(name, value)}" for name, value in values.items() if value is not None)

    return "; or ".join(dict.fromkeys(describe(getattr(run, field)) for run in runs))


def _plain(name: str, value: Any) -> str:
    return f"{value / 2**30:.0f} GiB" if name == "memory" and isinstance(value, int) else str(value)


def _verdict(found: Sequence[Standing], base: str) -> list[str]:
    highest = [found[index] for index in sorted(_highest(found))]
    if not highest:
        return ["No run finished."]
    said = f"Highest mean: {' and '.join(each.contender.title for each in highest)}, {points(highest[0].mean)}."
    tested = [each for each in found if each.corrected_p is not None]
    if not tested:
        return [said]
    clear = [each for each in tested if each.corrected_p is not None and each.corrected_p <= LEVEL]
    if clear:
        names = ", ".join(f"{each.contender.title} ({points(each.difference, sign=True)})" for each in clear)
        said += f" Significantly different from {base}: {names}."
    elif least_p(max(each.pairs for each in tested)) * len(tested) <= LEVEL:
        said += f" Nothing differs significantly from {base}."
    return [said, *_resolution(found)]


def _like_for_like(
    contests: Sequence[Contest], stand: Callable[[list[Contest]], Sequence[Standing | Overall]]
) -> list[str]:
    """How the methods without dropout stand beside full fine-tuning without it."""
    alike = [found for found in map(without_dropout, contests) if found is not None]
    if not alike:
        return []
    tested = [each for each in stand(alike) if each.p is not None]
    said = "; ".join(
        f"{each.contender.title} {points(each.difference, sign=True)} (p {p_value(each.p)}, "
        f"Holm {p_value(each.corrected_p)})"
        for each in tested
    )
    if not tested:
        return []
    place = f", on {len(alike)} of {len(contests)} tasks" if len(alike) < len(contests) else ""
    return [f"Like for like, beside {alike[0].reference_title}{place}: {said}.", *_resolution(tested)]


def _resolution(found: Sequence[Standing | Overall]) -> list[str]:
    """What p can at best be, where that matters."""
    tested = [each for each in found if each.p is not None]
    if not tested:
        return []
    pairs, count = max(each.pairs for each in tested), len(tested)
    least = least_p(pairs)
    corrected = min(1.0, least * count)
    said = (
        f"With {pairs} pair{'s' * (pairs > 1)} p is at best {p_value(least)}, and {p_value(corrected)} after "
        f"correction over {count} comparison{'s' * (count > 1)}"
    )
    if corrected <= LEVEL:
        return [f"{said}."]
    return [f"{said}: no difference, however large, could be significant here. It takes {pairs_needed(count)} pairs."]


def _chosen_once(contests: Sequence[Contest]) -> list[str]:
    runs_of = [contest.runs for contest in contests if len({run.plan.learning_rate for run in contest.runs}) > 1]
    if not any(len(run.candidates) > 1 for runs in runs_of for run in runs):
        return []
    said = "p takes learning rates as given: each method's was chosen once a task, so its pairs there share that luck."
    return [said]


def _highest(found: Sequence[Standing]) -> frozenset[int]:
    means = [points(each.mean) for each in found]
    known = [each.mean for each in found if each.values]
    return frozenset(index for index, mean in enumerate(means) if known and mean == points(max(known)))


def _seeds(standing: Standing) -> str:
    notes = [f"{standing.failed} failed"] if standing.failed else []
    if standing.missing:
        notes.append(f"{len(standing.missing)} missing")
    return f"{len(standing.values)}" + (f" ({', '.join(notes)})" if notes else "")


def _steps_to(costs: Costs) -> str:
    if costs.steps_to_reference is None:
        return NONE
    return f"{cells.count(costs.steps_to_reference)} ({costs.reached} of {costs.runs})"
