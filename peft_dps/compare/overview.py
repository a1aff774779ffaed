"""A contest at a glance: the table that the terminal shows and a report begins with."""

from __future__ import annotations

from collections.abc import Callable

from peft_dps.compare.cells import NONE, count, mebibytes, points, ratio
from peft_dps.compare.contest import Contest
from peft_dps.compare.costs import Costs, costs_of
from peft_dps.compare.sheet import Sheet
from peft_dps.compare.standing import Standing, standings


def overview_sheet(contest: Contest) -> Sheet:
    """Lay out one row per method: its score on every test domain, then what it costs.

    Args:
        contest: The contest.
    """
    found = {domain: standings(contest, domain) for domain in contest.domains}
    places = [f"{domain}{' (in domain)' if not index else ''}" for index, domain in enumerate(contest.domains)]
    failed = {each.variant: sum(run.failed for run in each.runs.values()) for each in contest.contenders}
    columns: dict[str, Callable[[Costs], str]] = {"entries trained": lambda each: count(each.trainable)}
    if any(failed.values()):
        columns["failed runs"] = lambda each: str(failed[each.contender.variant])
    if contest.timing:
        columns["step time"] = lambda each: ratio(each.step_ratio)
    columns["peak memory"] = lambda each: mebibytes(each.peak_memory)
    seeds = len(contest.seeds)
    return Sheet(
        title=f"{contest.name}: 100 x {contest.metric}" + (f", mean ± std over {seeds} seeds" if seeds > 1 else ""),
        header=("method", *places, *columns),
        rows=tuple(
            (
                costs.contender.title,
                *(_score(found[domain][row]) for domain in contest.domains),
                *(cell(costs) for cell in columns.values()),
            )
            for row, costs in enumerate(costs_of(contest))
        ),
        notes=(*_uncertainty(contest), *_proofs(contest)),
    )


def _score(standing: Standing) -> str:
    if not standing.values:
        return NONE
    spread = f" ± {points(standing.deviation, digits=1)}" if standing.deviation is not None else ""
    return f"{points(standing.mean, digits=1)}{spread}"


def _uncertainty(contest: Contest) -> list[str]:
    """What one seed leaves open."""
    sizes = [
        size
        for run in contest.runs
        if not run.failed
        for name, size in run.examples.items()
        if name.startswith("test/") and size
    ]
    if len(contest.seeds) > 1 or not sizes:
        return []
    said = f"One seed and {min(sizes):,} or more test examples a domain: "
    if contest.metrics != ("accuracy",):
        return [f"{said}how far scores vary from seed to seed is not known, so small differences say nothing."]
    margin = 1.96 * (0.25 / min(sizes)) ** 0.5
    return [
        f"{said}each accuracy is uncertain by up to {100 * margin:.1f} points, so smaller differences say nothing."
    ]


def _proofs(contest: Contest) -> list[str]:
    """That DPS engaged, in its own words."""
    said: dict[tuple[str, str], list[str]] = {}
    for each in contest.contenders:
        engaged = [run for run in each.finished if run.status and run.selections]
        if engaged:
            runs = f"in {len(engaged)} of {len(each.finished)} runs; with seed {engaged[0].plan.seed}, "
            runs = runs if len(contest.seeds) > 1 else ""
            said.setdefault((runs, engaged[0].status), []).append(each.title)
    return [
        f"Proof that {'; '.join(titles)} engaged, {runs}at the end of {'its' if len(titles) == 1 else 'their'} last "
        f"SUBNETWORK: {status}."
        for (runs, status), titles in said.items()
    ]
