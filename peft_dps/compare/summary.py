"""The tables of a report, from its contests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from peft_dps.compare.contest import REFERENCE, Contest
from peft_dps.compare.costs import Costs, costs_of, timed_against
from peft_dps.compare.run import Run
from peft_dps.compare.sheet import Sheet
from peft_dps.compare.significance import LEVEL, least_p, pairs_needed
from peft_dps.compare.standing import Overall, Standing, overall, standings

NONE = "-"


def score_sheet(contest: Contest, domain: str) -> Sheet:
    """Lay out how the methods stand on one test domain.

    Args:
        contest: The contest.
        domain: One of its domains.
    """
    found = standings(contest, domain)
    base = contest.reference.title if contest.reference else REFERENCE
    where = "in domain" if domain == contest.domains[0] else "out of domain"
    place = domain if domain == contest.task else f"{contest.task}, tested on {domain}"
    return Sheet(
        title=f"{place} ({where}), 100 x {contest.metric}",
        header=("method", "seeds", "mean", "std", "max", "95% interval", f"vs {base}", "p", "p (Holm)", "mean rank"),
        rows=tuple(
            (
                each.contender.title,
                _seeds(each),
                _points(each.mean),
                _points(each.deviation),
                _points(each.best),
                f"{_points(each.interval[0])} to {_points(each.interval[1])}" if each.interval else NONE,
                _points(each.difference, sign=True),
                _p(each.p),
                _p(each.corrected_p),
                f"{each.rank:.2f}",
            )
            for each in found
        ),
        notes=tuple(_verdict(found, base)),
        best=_highest(found),
    )


def cost_sheet(contest: Contest) -> Sheet:
    """Lay out what the methods cost.

    Args:
        contest: The contest.
    """
    costs = costs_of(contest)
    base = contest.reference.title if contest.reference else REFERENCE
    notes = []
    if contest.timing:
        titles = {each.variant: each.title for each in contest.contenders}
        measure = timed_against(contest.timing)
        rounds = min(map(len, contest.timing.seconds.values()), default=0)
        notes.append(
            f"Step time: relative to {titles.get(measure, measure)}, median of {rounds} rounds in which each method "
            "took one step in turn."
        )
    if any(each.time_to_reference is not None for each in costs):
        notes.append(
            f"Time to score: training time until the validation score first reaches that with which {base} "
            "ends on the same seed, median over the runs; in brackets, how many runs reach it."
        )
    memory = sorted({run.memory_kind for run in contest.runs if run.memory_kind})
    return Sheet(
        title=f"{contest.name}: costs",
        header=(
            "method",
            "learning rate",
            "entries trained",
            "of them in SUBNETWORK",
            "step time",
            "training time",
            f"time to score of {base}",
            f"peak memory ({', '.join(memory)})" if memory else "peak memory",
            "file size",
        ),
        rows=tuple(
            (
                each.contender.title,
                ", ".join(f"{rate:g}" for rate in each.learning_rates),
                _count(each.trainable),
                _count(each.selected),
                NONE if each.step_ratio is None else f"{each.step_ratio:.2f} x",
                _seconds(each.seconds),
                _time_to(each),
                _mebibytes(each.peak_memory),
                _mebibytes(each.file_size),
            )
            for each in costs
        ),
        notes=tuple(notes),
    )


def overall_sheet(contests: Sequence[Contest]) -> Sheet:
    """Lay out how the methods stand over all contests, best mean rank first.

    Args:
        contests: The contests.
    """
    found = sorted(overall(contests), key=lambda each: (-each.contests, each.rank))
    base = next((each.reference.title for each in contests if each.reference), REFERENCE)
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
                _points(each.difference, sign=True),
                f"{each.better} of {each.contests}" if each.pairs else NONE,
                str(each.pairs) if each.pairs else NONE,
                _p(each.p),
                _p(each.corrected_p),
                str(each.finished),
                str(each.failed),
            )
            for each in found
        ),
        notes=tuple(_resolution(found)),
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
    said = f"Highest mean: {' and '.join(each.contender.title for each in highest)}, {_points(highest[0].mean)}."
    tested = [each for each in found if each.corrected_p is not None]
    if not tested:
        return [said]
    clear = [each for each in tested if each.corrected_p is not None and each.corrected_p <= LEVEL]
    if clear:
        names = ", ".join(f"{each.contender.title} ({_points(each.difference, sign=True)})" for each in clear)
        said += f" Significantly different from {base}: {names}."
    elif least_p(max(each.pairs for each in tested)) * len(tested) <= LEVEL:
        said += f" Nothing differs significantly from {base}."
    return [said, *_resolution(found)]


def _resolution(found: Sequence[Standing] | Sequence[Overall]) -> list[str]:
    """What p can at best be, where that matters."""
    tested = [each for each in found if each.p is not None]
    if not tested:
        return []
    pairs, count = max(each.pairs for each in tested), len(tested)
    least = least_p(pairs)
    corrected = min(1.0, least * count)
    said = (
        f"With {pairs} pair{'s' * (pairs > 1)} p is at best {_p(least)}, and {_p(corrected)} after correction over "
        f"{count} comparison{'s' * (count > 1)}"
    )
    if corrected <= LEVEL:
        return [f"{said}."]
    return [f"{said}: no difference, however large, could be significant here. It takes {pairs_needed(count)} pairs."]


def _highest(found: Sequence[Standing]) -> frozenset[int]:
    means = [_points(each.mean) for each in found]
    known = [each.mean for each in found if each.values]
    return frozenset(index for index, mean in enumerate(means) if known and mean == _points(max(known)))


def _seeds(standing: Standing) -> str:
    notes = [f"{standing.failed} failed"] if standing.failed else []
    if standing.missing:
        notes.append(f"{len(standing.missing)} missing")
    return f"{len(standing.values)}" + (f" ({', '.join(notes)})" if notes else "")


def _points(score: float | None, *, sign: bool = False) -> str:
    if score is None or math.isnan(score):
        return NONE
    return f"{100 * score:+.2f}" if sign else f"{100 * score:.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.0001" if value < 0.00005 else f"{value:.4f}"


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def _mebibytes(value: float | None) -> str:
    return (
        NONE if value is None else f"{value / 2**20:,.0f} MiB" if value >= 2**20 * 10 else f"{value / 2**20:.2f} MiB"
    )


def _time_to(costs: Costs) -> str:
    if costs.time_to_reference is None:
        return NONE
    time = "never" if math.isinf(costs.time_to_reference) else _seconds(costs.time_to_reference)
    return f"{time} ({costs.reached} of {costs.runs})"
