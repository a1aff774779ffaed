"""A contest: all methods on one task, with one training size, model and budget."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft_dps.compare.methods import DROPOUT, NO_DROPOUT
from peft_dps.compare.plan import variant
from peft_dps.compare.results import Results
from peft_dps.compare.run import Run, Timing

REFERENCE = "full"
"""Variant of the method that the others are tested against, unless another is named."""
_WITHOUT_DROPOUT = (REFERENCE + NO_DROPOUT, variant(REFERENCE, {DROPOUT: False}))


@dataclass(frozen=True)
class Contender:
    """A method in a contest.

    Attributes:
        variant: The method with its options, see `Plan.variant`.
        title: What tables and figures call it.
        runs: Its run per seed, failed ones included.
    """

    variant: str
    title: str
    runs: Mapping[int, Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that did not fail, by seed."""
        return [self.runs[seed] for seed in sorted(self.runs) if not self.runs[seed].failed]

    def scores(self, domain: str) -> dict[int, float]:
        """Return the score per seed on a test domain; NaN for a run that failed or gave no number."""
        return {seed: _score(self.runs[seed], domain) for seed in sorted(self.runs)}


@dataclass(frozen=True)
class Contest:
    """All methods on one task, with one training size, model and budget.

    Attributes:
        name: What tables and figures call it.
        slug: The same for file names; unique in a report.
        task: Name of the task.
        train_size: Training examples drawn; None for all there are.
        model: The pretrained model.
        contenders: The methods, the reference first.
        seeds: All seeds that any of them ran with.
        domains: Test domains; the first is the one trained on.
        metrics: Names of the metrics whose mean is the score.
        timing: Step times, measured interleaved, if they were.
        superseded: Runs of which a later one, or one that finished, has the same method and seed.
        reference_variant: Variant of the method that the others are tested against.
        tried: Per variant, the learning rates that were tried on the validation split.
    """

    name: str
    slug: str
    task: str
    train_size: int | None
    model: str
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    timing: Timing | None = None
    superseded: tuple[Run, ...] = ()
    reference_variant: str = REFERENCE
    tried: Mapping[str, frozenset[float]] = field(default_factory=dict)

    @property
    def reference(self) -> Contender | None:
        """The contender that the others are tested against, if it is there."""
        return next((each for each in self.contenders if each.variant == self.reference_variant), None)

    @property
    def reference_title(self) -> str:
        """What tables and figures call the reference, also where it is not there."""
        return self.reference.title if self.reference else self.reference_variant

    @property
    def runs(self) -> list[Run]:
        """All runs, by contender and seed."""
        return [each.runs[seed] for each in self.contenders for seed in sorted(each.runs)]

    @property
    def metric(self) -> str:
        """Name of the score."""
        return "mean of " + " and ".join(self.metrics) if len(self.metrics) > 1 else "".join(self.metrics) or "score"


def contests_of(results: Results, reference: str = REFERENCE) -> list[Contest]:
    """Sort the reported runs of a result file into contests, in the order in which they appear.

    Args:
        results: The result file.
        reference: Variant of the method that the others are tested against.
    """
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in results.reported:
        groups[_key(run)].append(run)
    tried: dict[tuple[Any, ...], dict[str, frozenset[float]]] = defaultdict(dict)
    for run in results.runs.values():
        if run.plan.phase == "tune":
            rates = tried[_key(run)]
            rates[run.plan.variant] = rates.get(run.plan.variant, frozenset()) | {run.plan.learning_rate}
    order = _titles(results, reference)
    names = _distinct([_name(runs, key, groups.keys()) for key, runs in groups.items()], " ")
    slugs = _distinct([re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "contest" for name in names], "-")
    return [
        replace(
            _contest(name, slug, groups[key], order, results.timings, reference),
            reference_variant=reference,
            tried=tried[key],
        )
        for name, slug, key in zip(names, slugs, groups, strict=True)
    ]


def _key(run: Run) -> tuple[Any, ...]:
    """What the runs of a contest have in common."""
    plan = run.plan
    settings = tuple(asdict(plan.settings).items())
    return plan.task, plan.train_size, plan.model, settings, plan.protocol, tuple(plan.metrics)


def without_dropout(contest: Contest) -> Contest | None:
    """Return what of a contest is like for like without dropout: those methods beside full fine-tuning without it.

    Args:
        contest: The contest.

    Returns:
        The contest of these methods; None without such methods, and where another reference was asked for.
    """
    alike = tuple(each for each in contest.contenders if _is_without_dropout(each))
    references = [each.variant for each in alike if each.variant in _WITHOUT_DROPOUT]
    if contest.reference_variant != REFERENCE or len(alike) < 2 or not references:
        return None
    return replace(contest, contenders=alike, reference_variant=references[0])


def _is_without_dropout(contender: Contender) -> bool:
    run = next(iter(contender.finished or contender.runs.values()))
    by_name = run.plan.options.get(DROPOUT, not run.plan.method.endswith(NO_DROPOUT))
    return run.config.get(DROPOUT, by_name) is False


def _contest(
    name: str, slug: str, runs: Sequence[Run], titles: Mapping[str, str], timings: list[Timing], reference: str
) -> Contest:
    plan = runs[0].plan
    latest: dict[str, dict[int, Run]] = {variant: {} for variant in titles}
    superseded = []
    for run in runs:
        of_variant = latest[run.plan.variant]
        earlier = of_variant.get(run.plan.seed)
        if earlier is not None and run.failed and not earlier.failed:
            superseded.append(run)
            continue
        if earlier is not None:
            superseded.append(earlier)
        of_variant[run.plan.seed] = run
    first = max(runs, key=lambda run: len(run.scores))
    return Contest(
        name=name,
        slug=slug,
        task=plan.task,
        train_size=plan.train_size,
        model=plan.model,
        contenders=tuple(Contender(variant, titles[variant], found) for variant, found in latest.items() if found),
        seeds=tuple(sorted({run.plan.seed for run in runs})),
        domains=tuple(first.scores),
        metrics=tuple(first.metrics),
        timing=_best_timing([timing for timing in timings if timing.fits(plan)], latest, reference),
        superseded=tuple(superseded),
    )


def _best_timing(timings: Iterable[Timing], variants: Mapping[str, Any], reference: str) -> Timing | None:
    """Return the latest of the timings that measured the reference and the most of the methods beside it."""
    best: Timing | None = None
    most = (False, 0)
    for timing in timings:
        covers = (reference in timing.seconds, len(timing.seconds.keys() & {v for v in variants if variants[v]}))
        if covers >= most and covers[1] > 0:
            best, most = timing, covers
    return best


def _score(run: Run, domain: str) -> float:
    return run.score(domain) if not run.failed and domain in run.scores else math.nan


def _titles(results: Results, reference: str) -> dict[str, str]:
    """Per variant its title, the reference first and the others as they appear; no two alike."""
    found: dict[str, str] = {}
    for run in results.reported:
        found[run.plan.variant] = run.title or found.get(run.plan.variant, "") or run.plan.variant
    alike = {title for title in found.values() if list(found.values()).count(title) > 1}
    titles = {variant: f"{title} [{variant}]" if title in alike else title for variant, title in found.items()}
    return {variant: titles[variant] for variant in sorted(titles, key=lambda variant: variant != reference)}


def _name(runs: Sequence[Run], key: tuple[Any, ...], keys: Iterable[tuple[Any, ...]]) -> str:
    """Name the task and its size, and whatever else is not the same in all contests."""
    plan, others = runs[0].plan, list(keys)
    sizes = {run.examples["train"] for run in runs if "train" in run.examples}
    size = f"{plan.train_size if plan.train_size is not None else max(sizes, default=0):,} training examples"
    parts = [plan.task, size if plan.train_size is not None or sizes else "all training examples"]
    if len({other[2] for other in others}) > 1:
        parts.append(plan.model)
    for position, (setting, value) in enumerate(key[3]):
        if len({other[3][position][1] for other in others}) > 1:
            parts.append(f"{setting} {value}")
    if len({other[4] for other in others}) > 1:
        parts.append(f"protocol {plan.protocol}")
    if len({other[5] for other in others if other[0] == plan.task}) > 1:
        parts.append(f"scored by {' and '.join(plan.metrics) or 'the task'}")
    return ", ".join(parts)


def _distinct(names: Sequence[str], separator: str) -> list[str]:
    seen: dict[str, int] = defaultdict(int)
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}{separator}{seen[name]}")
    return distinct
