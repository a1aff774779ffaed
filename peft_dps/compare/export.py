"""The numbers of a report as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft_dps.compare.contest import Contender, Contest
from peft_dps.compare.costs import costs_of
from peft_dps.compare.sheet import to_csv
from peft_dps.compare.standing import overall, standings

_PLACE = ("task", "train_size", "model", "contest", "method", "title")


def scores_csv(contests: Sequence[Contest]) -> str:
    """Return a line per contest, test domain and method; scores as they are, not in points.

    Args:
        contests: The contests.
    """
    header = (
        *_PLACE,
        *("domain", "in_domain", "metric", "finished", "failed", "missing", "mean", "std", "max"),
        *("low", "high", "difference", "pairs", "p", "p_holm", "mean_rank"),
    )
    rows = [
        (
            *_place(contest, each.contender),
            *(domain, int(domain == contest.domains[0]), contest.metric),
            *(len(each.values), each.failed, len(each.missing), _number(each.mean), each.deviation),
            *(_number(each.best), *(each.interval or (None, None)), each.difference, each.pairs, each.p),
            *(each.corrected_p, each.rank),
        )
        for contest in contests
        for domain in contest.domains
        for each in standings(contest, domain)
    ]
    return to_csv(header, rows)


def costs_csv(contests: Sequence[Contest]) -> str:
    """Return a line per contest and method; bytes and seconds.

    Args:
        contests: The contests.
    """
    header = (
        *_PLACE,
        *("learning_rates", "precision", "trainable", "selected", "step_ratio", "seconds", "steps_to_reference"),
        *("time_to_reference", "reached", "runs", "peak_memory", "file_size"),
    )
    rows = [
        (
            *_place(contest, each.contender),
            *(" ".join(f"{rate:g}" for rate in each.learning_rates), contest.runs[0].plan.settings.precision),
            *(each.trainable, each.selected, each.step_ratio, each.seconds, each.steps_to_reference),
            *(each.time_to_reference, each.reached, each.runs, each.peak_memory, each.file_size),
        )
        for contest in contests
        for each in costs_of(contest)
    ]
    return to_csv(header, rows)


def overall_csv(contests: Sequence[Contest]) -> str:
    """Return a line per method, over all contests.

    Args:
        contests: The contests.
    """
    header = (
        *("method", "title", "tasks", "mean_rank", "difference", "better", "pairs", "p", "p_holm", "finished"),
        "failed",
    )
    rows = [
        (
            *(each.contender.variant, each.contender.title, each.contests, each.rank, each.difference, each.better),
            *(each.pairs, each.p, each.corrected_p, each.finished, each.failed),
        )
        for each in overall(contests)
    ]
    return to_csv(header, rows)


def runs_csv(contests: Sequence[Contest]) -> str:
    """Return a line per run and test domain, failed runs included.

    Args:
        contests: The contests.
    """
    header = (
        *_PLACE,
        *("domain", "seed", "learning_rate", "score", "validation_score", "seconds", "peak_memory"),
        *("file_size", "key", "error"),
    )
    rows = [
        (
            *_place(contest, each),
            *(
                domain,
                seed,
                f"{run.plan.learning_rate:g}",
                None if domain is None else _number(each.scores(domain)[seed]),
            ),
            *(_number(run.validation_score), run.seconds, run.peak_memory, run.file_size, run.plan.key, run.error),
        )
        for contest in contests
        for each in contest.contenders
        for seed, run in sorted(each.runs.items())
        for domain in contest.domains or (None,)
    ]
    return to_csv(header, rows)


def _place(contest: Contest, contender: Contender) -> tuple[str | int | None, ...]:
    return contest.task, contest.train_size, contest.model, contest.name, contender.variant, contender.title


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
